"""A conversation in a terminal: a line in, a reply as it comes, until the user leaves."""
import contextlib
import sys

from pangu_ms.errors import PanguError, one_line

with contextlib.suppress(ImportError):  # arrow keys and history while typing, where the platform has them
    import readline  # noqa: F401

COMMANDS = "/clear forgets the conversation, /thinking on|off|auto, /exit; Ctrl-C ends a reply, Ctrl-D the program"


def converse(template, stream, system=None, thinking=None, on_reply=None):
    """Talks until /exit, Ctrl-D, or Ctrl-C twice at the prompt.

    A message that is refused (it does not fit into the context) is forgotten. A reply that is cut short stays.

    Args:
        template (ChatTemplate): of the checkpoint.
        stream: gives the responses of a reply to ids, with text, as `stream_generate` does.
        system (str): the system message.
        thinking (str): as `ChatTemplate.render` takes it. /thinking changes it.
        on_reply: called with the last response of each reply.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    messages, interrupted = list(first), False
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            if interrupted:
                return print()
            interrupted = True
            print("\nCtrl-C again, Ctrl-D or /exit ends the program", file=sys.stderr)
            continue
        except UnicodeDecodeError:
            raise PanguError("standard input is not UTF-8: convert it") from None
        interrupted = False
        if line == "/exit":
            return
        if line == "/clear":
            messages = list(first)
        elif line in ("/thinking on", "/thinking off", "/thinking auto"):
            try:
                thinking = template.chat.mode(line.split()[1])
            except PanguError as error:
                print(one_line(error), file=sys.stderr)
        elif line.startswith("/"):
            print(f"{line.split()[0]}: {COMMANDS}", file=sys.stderr)
        elif line:
            user = {"role": "user", "content": line}
            try:
                reply, response = show_reply(stream(template.render([*messages, user], thinking)),
                                          template.reply_parser(thinking))
            except PanguError as error:
                print(f"error: {one_line(error)}; /clear forgets the conversation", file=sys.stderr)
                continue
            if response is not None:
                messages += [user, reply.message()]
                if on_reply is not None:
                    on_reply(response)


def show_reply(responses, parser):
    """Shows a reply as it comes; Ctrl-C ends it.

    Args:
        responses: the responses of the reply, with text, as `stream_generate` gives them.
        parser (ReplyParser): a new one.

    Returns:
        (reply, response): the `Reply` as far as it came, and its last response, or None when none came.
    """
    last, part = None, None
    try:
        for last in responses:
            part = _show(parser.push(last.text), part)
    except KeyboardInterrupt:
        print(" ...", end="", file=sys.stderr)
    _show(parser.flush(), part)
    print(flush=True)
    for call in parser.reply.tool_calls:
        if "error" in call:
            print(f"a tool call is broken: {call['error']}", file=sys.stderr)
    return parser.reply, last


def _show(parts, part):
    """Prints answer and tool calls to stdout, and reasoning to stderr: out of the way of a pipe, and dim on a terminal.

    Args:
        parts: [(part, text)] of `ReplyParser`.
        part: what was shown before.

    Returns:
        The part that was shown last.
    """
    for following, text in parts:
        if following == "reasoning":
            print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, end="", file=sys.stderr, flush=True)
        else:
            if part == "reasoning":
                print(file=sys.stderr, flush=True)
            print(text, end="", flush=True)
        part = following
    return part
