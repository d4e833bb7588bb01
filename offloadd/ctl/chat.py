"""`offloadctl chat`: one question from the command line or from a pipe, or a conversation on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import aiohttp
import typer

from offloadd.client import Server
from offloadd.ctl.app import ModelArgument, app
from offloadd.ctl.progress import told_why
from offloadd.ctl.show import aside, print_json
from offloadd.errors import OffloaddError
from offloadd.terminal import JsonOption

_PATH = "/v1/chat/completions"
_HELP = "/clear forgets the conversation, /system TEXT sets what the model is told first, /quit or Ctrl-D ends it"
_MAX_PROMPT = 32 * 2**20
Message = dict[str, str]


@dataclass(slots=True, kw_only=True)
class Talk:
    """A conversation with one model."""

    server: Server
    model: str
    system: str
    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)

    def body(self, question: str, **more: Any) -> dict[str, Any]:
        """The request that asks it."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*told, *self.messages, {"role": "user", "content": question}]
        return {"model": self.model, "messages": asked, **self.options, **more}

    def remember(self, question: str, answer: str) -> None:
        """The next question stands in their light."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@app.command()
def chat(
    context: typer.Context,
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Argument(help="What to ask; without it, standard input or a conversation.")] = None,
    system: Annotated[str, typer.Option(help="What the model is told before anything else.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 for the likeliest answer; higher varies more.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model, loading it if need be; the answer comes as it is made.

    With a PROMPT, or with standard input that is not a terminal, one question is asked. Else it is a conversation.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in options.items() if value is not None}
    talk = Talk(server=context.obj, model=model, system=system, options=given)
    question = " ".join(prompt) if prompt else "" if sys.stdin.isatty() else sys.stdin.read(_MAX_PROMPT).strip()
    if as_json and not question:
        raise typer.BadParameter("it needs a question, as PROMPT or from standard input", param_hint="--json")
    if as_json:
        print_json(context.obj.post(_PATH, talk.body(question), within_s=None)[1])
    elif question:
        asyncio.run(_ask_once(talk, question))
    elif sys.stdin.isatty():
        _converse(talk)
    else:
        raise OffloaddError("there is nothing to ask", hint="give a PROMPT, or write one to standard input")


async def _ask_once(talk: Talk, question: str) -> None:
    async with talk.server.session() as session:
        await _stream(talk, session, question)
    print()


def _converse(talk: Talk) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited and called back)
    aside.print(f"{talk.model} at {talk.server.address}. {_HELP}.", style="dim", markup=False)
    while (line := _read()) is not None:
        if not line.startswith("/"):
            asyncio.run(_turn(talk, line))
        elif not _steer(talk, line):
            return


def _read() -> str | None:
    """The next line that says something; None at the end of input."""
    try:
        while not (line := input(">>> ").strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return line


def _steer(talk: Talk, line: str) -> bool:
    """Do what a line that begins with a slash says; False to end the conversation."""
    word, _, rest = line.partition(" ")
    if word in ("/quit", "/exit", "/bye"):
        return False
    if word == "/clear":
        talk.messages.clear()
    elif word == "/system":
        talk.system = rest.strip()
    else:
        aside.print(_HELP, style="dim", markup=False)
    return True


async def _turn(talk: Talk, question: str) -> None:
    """Ask; Ctrl-C ends the answer, which the daemon's engine then stops making, and not the conversation."""
    asking = asyncio.ensure_future(_answer(talk, question))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, asking.cancel)
    try:
        await asking
    except asyncio.CancelledError:
        print(" … stopped")
    except OffloaddError as error:
        aside.print(f"error: {error.message}", style="red", markup=False)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _answer(talk: Talk, question: str) -> None:
    async with talk.server.session() as session:
        talk.remember(question, await _stream(talk, session, question))
    print()


async def _stream(talk: Talk, session: aiohttp.ClientSession, question: str) -> str:
    """Print the answer as it comes; the whole of it."""
    said: list[str] = []
    async with told_why(talk.server, session, talk.model) as waiting:
        async for _, data in talk.server.events(session, "POST", _PATH, talk.body(question, stream=True)):
            if waiting is not None and not waiting.done():
                waiting.cancel()
                await asyncio.wait({waiting})
            if data == "[DONE]":
                break
            said += _pieces(json.loads(data))
    return "".join(said)


def _pieces(chunk: dict[str, Any]) -> Sequence[str]:
    """Print what one event adds. What the model thinks aloud is shown apart and is no part of its answer."""
    if "error" in chunk:
        raise OffloaddError(f"the answer broke off: {chunk['error']['message']}")
    said: list[str] = []
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content"):
            aside.print(thought, style="dim", end="", markup=False)
        if text := delta.get("content"):
            print(text, end="", flush=True)
            said.append(text)
    return said
