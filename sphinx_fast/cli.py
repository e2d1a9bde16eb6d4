"""The command line: thin verbs over the package. Every error a user can cause is one line and exit status 1."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx_fast.infer import Sphinx


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = argparse.ArgumentParser(prog="sphinx-fast", description="Ask pictures questions with SPHINX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    loading = argparse.ArgumentParser(add_help=False)
    loading.add_argument("--model", metavar="FOLDER", help="model folder or hub id (default: the embedded sphinx-mini)")
    loading.add_argument("--variant", help="see the picture through another preset's views, e.g. sphinx-2k")
    loading.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    loading.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored where that is fast)")
    loading.add_argument("--quantize", metavar="METHOD", help="the language model's weights: int8, int4 or nf4 (GPU)")
    loading.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    loading.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable answer")
    loading.add_argument("--top-p", type=float, default=0.95)
    loading.add_argument("--seed", type=int, help="of the sampling, when the temperature is above 0")

    ask = verbs.add_parser("ask", parents=[loading], help="one question about one picture")
    ask.add_argument("image", help="picture file (JPEG, PNG, WEBP), or - for none")
    ask.add_argument("question")
    ask.add_argument("--json", action="store_true", help="one JSON object: answer, boxes in pixels, time")
    ask.set_defaults(run=run_ask)

    chat = verbs.add_parser("chat", parents=[loading], help="talk about one picture; an empty line ends it")
    chat.add_argument("image", help="picture file, or - for none")
    chat.set_defaults(run=run_chat)

    convert = verbs.add_parser("convert", help="released checkpoint folder -> safetensors folder")
    convert.add_argument("released", metavar="RELEASED_FOLDER")
    convert.add_argument("target", metavar="NEW_FOLDER")
    convert.add_argument("--variant", help="llama_type, when meta.json does not name it")
    convert.add_argument("--dtype", help="of the written weights (default: as stored)")
    convert.add_argument("--quiet", action="store_true", help="no progress bar")
    convert.set_defaults(run=run_convert)

    data = verbs.add_parser(
        "data",
        help="any data set -> LLaVA's JSON lines, that training reads",
        usage="sphinx-fast data TYPE PATH [PATH ...] OUT.jsonl [--root FOLDER] [--option key=value ...] [--quiet]"
        " | --list",
    )
    data.add_argument("words", nargs="*", metavar="TYPE PATH OUT.jsonl", help="one of the types, files, a new file")
    data.add_argument("--list", action="store_true", help="print the types and their options")
    data.add_argument("--root", metavar="FOLDER", help="that pictures are named from (default: beside each file)")
    data.add_argument("--option", action="append", default=[], metavar="key=value", help="of the type")
    data.add_argument("--quiet", action="store_true", help="no progress bar")
    data.set_defaults(run=run_data)

    train = verbs.add_parser("train", help="train or fine-tune: stage1 or stage2 of the paper, from a YAML file")
    train.add_argument("stage", choices=("stage1", "stage2"))
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings in place of the file's, dotted")
    train.add_argument("--dry-run", action="store_true", help="print parameters, memory and steps, and train nothing")
    train.add_argument("--processes", type=int, default=1, metavar="N", help="to start on this machine, a GPU each")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(run=run_train)

    mix = verbs.add_parser(
        "mix",
        help="beta * REAL + (1 - beta) * SYN of two or more model folders",
        usage="sphinx-fast mix --beta B REAL SYN OUT | --weights W,W,... A B ... OUT | --sweep BETAS --data FILE "
        "[--data NAME=FILE ...] REAL SYN [OUT]  [--parts llm|trained] [--rows N] [--device D] [--quiet]",
    )
    mix.add_argument("folders", nargs="+", metavar="FOLDER", help="model folders, then the folder to create")
    how = mix.add_mutually_exclusive_group(required=True)
    how.add_argument("--beta", type=float, help="weight of the first of two folders")
    how.add_argument("--weights", metavar="W,W,...", help="a weight for each folder, together 1")
    how.add_argument("--sweep", metavar="BETAS", help="0,0.1,...,1: measure each beta; OUT gets table and plot")
    mix.add_argument("--parts", choices=("llm", "trained"), default="llm", help="trained: mix the fusion as well")
    mix.add_argument("--data", action="append", default=[], metavar="[NAME=]FILE", help="held-out rows of a domain")
    mix.add_argument("--rows", type=int, default=256, metavar="N", help="of each file, for --sweep (default: 256)")
    mix.add_argument("--device", help="for --sweep: cpu, cuda, cuda:1 (default: the GPU if there is one)")
    mix.add_argument("--quiet", action="store_true", help="no progress bar")
    mix.set_defaults(run=run_mix)

    doctor = verbs.add_parser("doctor", help="versions, what is compiled, which kernels are active, what to do")
    doctor.set_defaults(run=run_doctor)
    return parser


def _load(args: argparse.Namespace) -> Sphinx:
    from sphinx_fast.infer import Sphinx

    with _notes_on_stderr():
        return Sphinx.from_pretrained(
            args.model, device=args.device, dtype=args.dtype, variant=args.variant, quantize=args.quantize
        )


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Show what loading has to say: the memory needed, then what was quantised. stdout is for answers."""
    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger("sphinx_fast")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return {name: getattr(args, name) for name in names}


def _picture(args: argparse.Namespace) -> Any:
    """The picture, read before the model is loaded, so that a bad file is said at once."""
    from sphinx_fast.image.decode import load_picture

    return None if args.image == "-" else load_picture(args.image)


def run_ask(args: argparse.Namespace) -> int:
    """`sphinx-fast ask`."""
    picture = _picture(args)
    sphinx = _load(args)
    start = time.perf_counter()
    if not args.json:
        for piece in sphinx.stream(picture, args.question, **_sampling(args)):
            print(piece, end="", flush=True)
        print()
        return 0
    answer = sphinx.ask(picture, args.question, **_sampling(args))
    record: dict[str, Any] = {"image": args.image, "question": args.question, "answer": answer}
    if picture is not None:
        from sphinx_fast.tasks.boxes import parse_boxes

        height, width = picture.shape[:2]
        boxes = [box.to_picture(width, height, clip=True) for box in parse_boxes(answer)]
        record["boxes"] = [[round(v, 1) for v in (box.x1, box.y1, box.x2, box.y2)] for box in boxes]
    record["seconds"] = round(time.perf_counter() - start, 3)
    print(json.dumps(record, ensure_ascii=False))
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """`sphinx-fast chat`."""
    picture = _picture(args)
    conversation = _load(args).chat(picture)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            break
        if not question:
            break
        try:
            for piece in conversation.stream(question, **_sampling(args)):
                print(piece, end="", flush=True)
        except ValueError as error:  # the context is full: say so, keep the conversation
            print(f"sphinx-fast: {error}", file=sys.stderr, end="")
        print()
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """`sphinx-fast convert`."""
    from sphinx_fast.infer.loading import parse_dtype
    from sphinx_fast.weights.accessory import convert

    dtype = parse_dtype(args.dtype) if args.dtype else None
    config = convert(args.released, args.target, variant=args.variant, dtype=dtype, progress=not args.quiet)
    vision = config.vision_config
    print(f"{args.target}: {vision.num_views} view(s), {vision.tokens_per_picture} visual positions a picture")
    return 0


def run_data(args: argparse.Namespace) -> int:
    """`sphinx-fast data`."""
    from sphinx_fast.data import command

    return command.run(args)


def run_train(args: argparse.Namespace) -> int:
    """`sphinx-fast train`."""
    from sphinx_fast.train.settings import read_settings

    settings = read_settings(args.stage, args.config, args.overrides)
    from sphinx_fast.train import command, launch

    with _notes_on_stderr():
        if args.dry_run:
            print(command.dry_run(settings, args.processes))
        else:
            print(launch.launch(settings, args.processes, progress=not args.quiet))
    return 0


def run_mix(args: argparse.Namespace) -> int:
    """`sphinx-fast mix`."""
    from sphinx_fast.weights import command

    return command.run(args)


def run_doctor(args: argparse.Namespace) -> int:
    """`sphinx-fast doctor`."""
    from sphinx_fast.doctor import report

    print(report())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: exit status 0, 1 with one line on stderr, 130 after Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse ends a list of words at the next option: settings may stand behind one too.
    if rest and (args.verb != "train" or not all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"sphinx-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
