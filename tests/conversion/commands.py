"""The command as tests call it."""
from pangu_ms.conversion.command import main
from tests.checkpoint import generate


def convert(command, source, target, *options):
    assert main([command, str(source), str(target), *map(str, options)]) == 0
    return generate.read(target) if any(target.glob("*.safetensors")) else None


def refused(capsys, command, source, target, *options):
    capsys.readouterr()
    assert main([command, str(source), str(target), *map(str, options)]) == 2
    return capsys.readouterr().err
