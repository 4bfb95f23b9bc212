"""The `flexllm` command. Each verb is a file; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from flexllm import __version__
from flexllm import config as settings
from flexllm.cli import chat, compile, demo, finetune, generate, plan, profile, serve, trace

USAGE_ERROR = 2  # also of errors in the user's files and values
INTERRUPTED = 130

app = typer.Typer(
    name="flexllm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(finetune.finetune)
app.command()(compile.compile)
app.command()(profile.profile)
app.command()(plan.plan)
app.command()(trace.trace)
app.command()(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexllm {__version__}")
        raise typer.Exit


@app.callback()
def flexllm(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error instead of one line.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,  # noqa: ARG001
) -> None:
    """Serve a language model under latency objectives and finetune adapters of it in the same batches.

    MODEL is a Hugging Face folder or id, a .gguf file, or "default" (SmolLM2-135M-Instruct).
    """
    context.obj = debug


def run(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. What a user can put right is one line on stderr and status 2."""
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv[:1]
    settings.shorten_spinning()
    try:
        status = app(args=argv, prog_name="flexllm", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except TyperException as error:  # unknown option, missing argument, value out of range
        return _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        return _fail(str(error) or type(error).__name__)


def _fail(message: str) -> int:
    typer.echo(f"flexllm: error: {' '.join(message.split())}", err=True)
    return USAGE_ERROR


def main() -> None:
    sys.exit(run())


if __name__ == "__main__":
    main()
