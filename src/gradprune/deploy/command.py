"""What does `python -m gradprune` understand, and what does it answer with?

Words are read here and answers printed here; the work is done in `pruned`, `compared` and `pack`, whose errors are
already sentences.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gradprune.core.encoded import readable
from gradprune.core.tables import as_text
from gradprune.deploy import compared, pack, packed, pruned
from gradprune.deploy.printed import folded
from gradprune.deploy.unpack import unpack

DONE, DIFFER, REFUSED, NOT_WRITTEN, INTERRUPTED, UNREAD = 0, 1, 2, 3, 130, 141

_ABOUT = """\
Prune a checkpoint, look into it, store it without its zeros. No code needed.

A checkpoint is a .safetensors file; or a folder of shards with their index, as
save_pretrained writes it; or a .pt file that holds a state dict, of which a
.safetensors file is made. It may be larger than your memory: it is read piece by
piece, and written under a temporary name that takes the place of the output at the
end. Whatever happens in between, power cut or full disk, you have the old file or
the new one, and never half of one."""

_EXIT = """\
exit codes:
  0    done (diff: no difference)
  1    diff: the checkpoints differ
  2    refused: a wrong argument, or a file that is damaged or no checkpoint
  3    could not be read or written: a full disk, a missing right
  130  interrupted; the output is as it was before
  141  nobody read the answer to its end, as in `... | head -1`; what was to be done is

Every command has a --help of its own, and --json for scripts."""

_PRUNE = """\
Set the smallest weights of a checkpoint to zero, and write the result to OUTPUT.

The same weights go as by gradprune.prune on the loaded model, where its layers can be
asked (a note says whether), and exactly as many: with --sparsity 0.5 of ten million
weights, five million. Names, dtypes, metadata
and all other tensors stay as they are, and so does the size: a zero takes as many
bytes as any number. `pack` is what makes it smaller."""

_PRUNE_MORE = """\
which tensors are weights?
  Those of two dimensions or more that enter a product. Where config.json lies beside
  the file and transformers is installed, the layers of that model are asked. Else names
  have to do: embeddings, norms and biases are known by what they are called. --dry-run
  lists every tensor with the reason; --include and --exclude overrule it.

examples:
  python -m gradprune prune model.safetensors half.safetensors --sparsity 0.5
  python -m gradprune prune llama/ llama-2of4/ --granularity 2:4 --exclude 'lm_head.*'
  python -m gradprune prune llama/ --sparsity 0.6 --scope row --dry-run"""

_REPORT = """\
Tell what is in a checkpoint: tensors, zeros, bytes, and what `pack` would make of it.
Layers that differ only in their number share a line; --json has them one by one."""

_PACK = """\
Store a checkpoint without its zeros: one bit a weight, and the weights that are left.
`unpack` gives back the same files, byte for byte; of a .pt file the same tensors, as
safetensors."""

_UNPACK = """\
Write the checkpoint that `pack` was given, byte for byte; of a .pt file the same tensors,
as safetensors."""

_DIFF = """\
Tell in what two checkpoints differ, tensor by tensor and bit for bit. Like diff(1), it
exits with 0 where they are the same and with 1 where they are not."""


class Answer(NamedTuple):
    """What a command found: for scripts, for people, and how it exits."""

    told: dict[str, Any]
    text: str
    code: int = DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, print its answer, return the exit code.

    Args:
        arguments: the words of the command line; those of the process unless given.
    """
    try:
        try:
            return _answered(arguments)
        finally:
            sys.stdout.flush()  # here an error can be caught, at the end of the process not
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself still flushes
        return UNREAD


def _answered(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quiet or options.json:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            answer: Answer = options.run(options)
    except KeyboardInterrupt:
        return _failed(options, "interrupted; the output is as it was before", INTERRUPTED)
    except (OSError, MemoryError) as error:
        missing = isinstance(error, FileNotFoundError) and error.errno is None  # ours: a wrong argument
        text = str(error) if error.args and not getattr(error, "strerror", None) else _of_the_system(error)
        return _failed(options, text, REFUSED if missing else NOT_WRITTEN)
    except (ValueError, TypeError, ImportError) as error:
        return _failed(options, str(error), REFUSED)
    notes = [*answer.told.get("notes", []), *(str(each.message) for each in caught)]
    told = {"command": options.command, **answer.told, "notes": notes}
    print(json.dumps(told, indent=1) if options.json else answer.text)
    if not options.quiet and not options.json:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    return answer.code


def _failed(options: argparse.Namespace, text: str, code: int) -> int:
    if options.json:
        print(json.dumps({"command": options.command, "error": text, "code": code}, indent=1))
    print(f"gradprune {options.command}: {text}", file=sys.stderr)
    return code


def _of_the_system(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    where = getattr(error, "filename", None)
    return f"{text}: {where!r}" if where else text


# ------------------------------------------------------------------------------------------------------- the commands


def _prune(options: argparse.Namespace) -> Answer:
    if options.output is None and not options.dry_run:
        raise ValueError("the output is missing: name it, or ask for a --dry-run")
    start = time.perf_counter()
    done = pruned.prune_file(
        options.input,
        options.output,
        sparsity=options.sparsity,
        threshold=options.threshold,
        scope=options.scope,
        granularity=options.granularity,
        include=options.include,
        exclude=options.exclude,
        min_keep=options.min_keep,
        by_name=options.by_name,
        dry_run=options.dry_run,
    )
    goes = done.pruned if done.done else done.goal
    told = {
        "input": options.input,
        "output": options.output,
        "dry_run": options.dry_run,
        "weights": done.weights,
        "pruned": goes,
        "sparsity": None if goes is None else goes / max(done.weights, 1),
        "bytes": done.size,
        "seconds": round(time.perf_counter() - start, 3),
        "notes": list(done.notes),
        "tensors": [row._asdict() for row in done.rows],
    }
    would = "" if done.done else "would "
    went = f"{goes:,}" if goes is not None else f"those below {options.threshold:g}"
    share = "how many is known when all are read" if goes is None else f"{goes / max(done.weights, 1):.2%}"
    line = f"{went} of {done.weights:,} weights {would}go ({share})"
    lines = [as_text(folded(_prune_row(row) for row in done.rows)), line]
    if done.done:
        lines.append(f"written: {options.output} ({readable(done.size)}, as before: `pack` makes it smaller)")
    return Answer(told, "\n".join(lines))


def _prune_row(row: pruned.Row) -> dict[str, Any]:
    stays = row.reason or ("to be pruned" if row.kept is None else f"{row.kept / max(row.weights, 1):.1%}")
    shape = " x ".join(map(str, row.shape))
    return {"tensor": row.name, "dtype": row.dtype, "shape": shape, "entries": row.weights, "kept": stays}


def _report(options: argparse.Namespace) -> Answer:
    found = compared.contents(options.checkpoint)
    rows = [
        {
            "tensor": row.name,
            "dtype": row.dtype,
            "shape": " x ".join(map(str, row.shape)),
            "entries": row.entries,
            "zeros": "?" if row.zeros is None else f"{row.zeros / max(row.entries, 1):.1%}",
            "bytes": row.bytes,
            "packed": row.bytes_packed,
        }
        for row in found.rows
    ]
    entries, zeros = sum(row.entries for row in found.rows), sum(row.zeros or 0 for row in found.rows)
    weights = [row for row in found.rows if not row.reason]
    of_weights, zero_weights = sum(row.entries for row in weights), sum(row.zeros or 0 for row in weights)
    told = {
        "checkpoint": options.checkpoint,
        "files": found.parts,
        "bytes": found.bytes,
        "bytes_packed": found.bytes_packed,
        "entries": entries,
        "zeros": zeros,
        "weights": of_weights,
        "sparsity": zero_weights / max(of_weights, 1),
        "packed": packed.KEY in found.metadata,
        "metadata": {key: text for key, text in found.metadata.items() if key != packed.KEY},
        "notes": ["it is packed: what is listed is how; `unpack` gives the tensors"] * (packed.KEY in found.metadata),
        "tensors": [row._asdict() for row in found.rows],
    }
    lines = [
        as_text(folded(rows, bytes_of=("bytes", "packed"))) if rows else "no tensors",
        f"{len(rows):,} tensors, {found.parts:,} file{'s' * (found.parts > 1)}: {entries:,} entries, {zeros:,} zeros",
        f"of the {of_weights:,} weights, by their names, {zero_weights / max(of_weights, 1):.2%} are zero",
        f"{readable(found.bytes)}; packed about {readable(found.bytes_packed)}",
    ]
    return Answer(told, "\n".join(lines))


def _pack(options: argparse.Namespace) -> Answer:
    done = pack.pack(options.input, options.output, code=options.code)
    return Answer({"input": options.input, **done._asdict(), "path": str(done.path)}, str(done))


def _unpack(options: argparse.Namespace) -> Answer:
    path = unpack(options.input, options.output)
    return Answer({"input": options.input, "path": str(path)}, f"written: {path}")


def _diff(options: argparse.Namespace) -> Answer:
    found = compared.differences(options.first, options.second)
    differ = [row for row in found if row.what != "same"]
    told = {
        "first": options.first,
        "second": options.second,
        "same": not differ,
        "tensors": [row._asdict() for row in found],
    }
    rows = [
        {
            "tensor": row.name,
            "differs": row.what,
            "entries": row.entries,
            "changed": row.changed,
            "became zero": row.became_zero,
            "came back": row.came_back,
            "largest change": row.largest if row.largest is not None else "",
        }
        for row in differ
    ]
    verdict = (
        f"{len(differ):,} of {len(found):,} tensors differ" if differ else f"all {len(found):,} tensors are the same"
    )
    text = "\n".join([as_text(folded(rows)), verdict] if differ else [verdict])
    return Answer(told, text, DIFFER if differ else DONE)


# ---------------------------------------------------------------------------------------------------------- the words


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _words(argparse.ArgumentParser, "gradprune", _ABOUT, _EXIT)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], Answer], line: str, about: str, more: str = "") -> Any:
        own = _words(commands.add_parser, name, about, more, help=line)
        own.set_defaults(run=run)
        own.add_argument("--json", action="store_true", help="answer with one JSON object on standard output")
        own.add_argument("--quiet", action="store_true", help="no progress bar and no notes")
        return own

    prune = command("prune", _prune, "set the smallest weights to zero", _PRUNE, _PRUNE_MORE)
    prune.add_argument("input", metavar="INPUT", help="the checkpoint, a file or a folder")
    prune.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="a file, which may be INPUT itself; for a folder a new folder"
    )
    prune.add_argument("--sparsity", type=float, metavar="S", help="the fraction of the weights that goes, from 0 to 1")
    prune.add_argument(
        "--threshold", type=float, metavar="T", help="in its place: weights of a smaller magnitude than T go"
    )
    prune.add_argument(
        "--scope",
        choices=pruned.SCOPES,
        default="global",
        help="who competes: all weights, those of a layer, those of an output (row); erk: small layers stay denser; "
        "lamp: all weights, each by its share in its layer (default: global)",
    )
    prune.add_argument(
        "--granularity",
        default="weight",
        metavar="G",
        help="what goes together: weight, channel, 2:4 (two of four stay), or a block such as 4x4 (default: weight)",
    )
    prune.add_argument(
        "--include", action="append", metavar="GLOB", help="prune only tensors of such names; may be repeated"
    )
    prune.add_argument(
        "--exclude", action="append", metavar="GLOB", help="leave tensors of such names alone; may be repeated"
    )
    prune.add_argument("--min-keep", type=int, metavar="N", help="the least number of weights that stay in each tensor")
    prune.add_argument(
        "--by-name", action="store_true", help="tell weights by their names also where transformers knows the model"
    )
    prune.add_argument(
        "--dry-run", action="store_true", help="say what would be done, tensor by tensor, and write nothing"
    )

    report = command("report", _report, "what is in it: tensors, zeros, bytes", _REPORT)
    report.add_argument("checkpoint", metavar="CHECKPOINT", help="a file or a folder")

    for name, run, line, about in (
        ("pack", _pack, "store it without its zeros", _PACK),
        ("unpack", _unpack, "give back what was packed", _UNPACK),
    ):
        own = command(name, run, line, about)
        own.add_argument("input", metavar="INPUT", help="a file or a folder")
        own.add_argument("output", metavar="OUTPUT", help="a file; for a folder a new folder")
        if name == "pack":
            own.add_argument(
                "--code",
                choices=pack.CODES,
                default="bits",
                help="bits; or smaller: book numbers the values of a tensor where they are few, entropy codes all by "
                "Huffman's code (default: bits)",
            )

    diff = command("diff", _diff, "in what two of them differ", _DIFF)
    diff.add_argument("first", metavar="FIRST", help="a file or a folder")
    diff.add_argument("second", metavar="SECOND", help="a file or a folder")
    return parser


def _words(make: Callable[..., Any], name: str, about: str, more: str, **further: Any) -> Any:
    prog = {} if make is not argparse.ArgumentParser else {"prog": "python -m gradprune"}
    given = (name,) if make is not argparse.ArgumentParser else ()
    return make(
        *given, **prog, **further, description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
