"""`hlaunch chat`: a conversation in the terminal that streams. Knows the prompt loop and what of a reply is shown."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.client import Client
    from launcher.console import Console

HELP = "/reset forgets the conversation, /system TEXT sets instructions, /exit or Ctrl-D leaves, Ctrl-C stops a reply"


def register(app: typer.Typer) -> None:
    @app.command("chat")
    def chat(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this one thing and leave.")] = None,
        system: Annotated[str | None, typer.Option("--system", help="Instructions for the model.")] = None,
        temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")] = None,
        max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest reply, in tokens.")] = None,
        effort: Annotated[str | None, typer.Option("--effort", help="Reasoning: low, medium or high.")] = None,
        url: Annotated[str | None, typer.Option("--url", help="Use the server at this address.")] = None,
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For a server started by this command.")
        ] = None,
    ) -> int:
        """Talk to a model in the terminal."""
        from launcher.client import Client, served_model
        from launcher.exit_codes import ExitCode
        from launcher.session import server_for

        # Read first: a model is not started for nothing to say.
        message = _one_message(message)
        invocation = invocation_of(ctx)
        with server_for(invocation, name, url=url, overrides=overrides or []) as server:
            client = Client(server.url, server.api_key)
            options = {"temperature": temperature, "max_completion_tokens": max_tokens, "reasoning_effort": effort}
            conversation = Conversation(
                client,
                invocation.console,
                served_model(client),
                {key: value for key, value in options.items() if value is not None},
                system,
            )
            with contextlib.closing(client):
                if message is None:
                    conversation.run()
                elif not conversation.ask(message):
                    return ExitCode.INTERRUPTED
        return ExitCode.OK


def _one_message(given: str | None) -> str | None:
    """Return what is to be asked, from the option or from a pipe; None means a conversation in the terminal.

    Raises: UsageError when it is empty or no text.
    """
    from launcher.errors import UsageError

    if given is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    try:
        message = given if given is not None else sys.stdin.read() if sys.stdin is not None else ""
        # Bytes that are no UTF-8 come as lone surrogates, by an option always, by a pipe in the C locale.
        message.encode()
    except UnicodeError as error:
        raise UsageError("the message is no UTF-8 text") from error
    if not message.strip():
        raise UsageError("the message is empty", hint="-m TEXT, or text on standard input")
    return message if given is not None else message.strip()


@dataclass(slots=True)
class Conversation:
    """The messages so far, and the loop that adds to them."""

    client: Client
    console: Console
    model: str
    options: dict[str, Any]
    system: str | None
    history: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Read lines until the user leaves."""
        # Importing it gives input() a line editor with history.
        import readline  # noqa: F401

        self.console.note(f"{self.model} at {self.client.base_url}. {HELP}")
        while True:
            try:
                line = input("you> ").strip()
            except EOFError:
                self.console.note("")
                return
            except KeyboardInterrupt:
                self.console.note("")
                continue
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                self.history.clear()
                self.console.note("the conversation is forgotten")
            elif line.startswith("/system"):
                self.system = line.removeprefix("/system").strip() or None
                self.console.note("instructions set" if self.system else "instructions removed")
            elif line.startswith("/"):
                self.console.note(HELP)
            elif line:
                self._ask_and_survive(line)

    def ask(self, text: str) -> bool:
        """Send a message and stream the reply to stdout; the reply joins the history. False when Ctrl-C cut it."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [*self.history, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "stream": True, **self.options}
        answer: list[str] = []
        is_reasoning = False
        is_whole = True
        events = self.client.stream("/v1/chat/completions", body)
        try:
            for event in events:
                for choice in event.data.get("choices", ()):
                    delta = choice.get("delta", {})
                    if thought := delta.get("reasoning"):
                        self.console.piece(thought if is_reasoning else f"(thinking) {thought}", is_muted=True)
                        is_reasoning = True
                    if piece := delta.get("content"):
                        if is_reasoning:
                            self.console.piece("\n", is_muted=True)
                            is_reasoning = False
                        answer.append(piece)
                        self.console.piece(piece)
        except KeyboardInterrupt:
            answer.append(" …")
            is_whole = False
        finally:
            events.close()  # type: ignore[attr-defined]
            self.console.raw("\n")
        self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(answer)}]
        return is_whole

    def _ask_and_survive(self, text: str) -> None:
        """Ask; a refused message or a lost connection is shown, and the conversation goes on."""
        from launcher.errors import HlaunchError

        try:
            self.ask(text)
        except HlaunchError as error:
            self.console.failure(error)
