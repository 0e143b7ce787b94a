
import pytest


@pytest.fixture(scope="session")
def mindformers(tmp_path_factory):
    """Our module that imports MindFormers, imported so that its log directory is not made in the current one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_DEFAULT_PATH", str(tmp_path_factory.mktemp("mindformers")))
        from pangu_ms.training.run import mindformers
    return mindformers
