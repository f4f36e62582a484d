"""What all command-line tools share: help from the docstring, one line for bad input, a bar or plain lines."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from cosyvoice_ft.files import BadInput


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose --help is the tool's docstring, as it stands."""
    return argparse.ArgumentParser(description=doc.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_with_conf(arguments: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Add --conf and parse; return (arguments, overrides): options the parser does not know are keys of the conf."""
    text = "the speaker's settings; any of them can follow as --key value"
    arguments.add_argument("--conf", default="conf/cosyvoice2.yaml", metavar="YAML", help=text)
    known, overrides, words = [], [], sys.argv[1:]
    while words:  # parse_known_args takes --key=a value with blanks for a positional argument
        word = words.pop(0)
        unknown = word.startswith("--") and word.partition("=")[0] not in arguments._option_string_actions
        (overrides if unknown else known).append(word)
        if unknown and "=" not in word and words:
            overrides.append(words.pop(0))
    return arguments.parse_args(known), overrides


def run(main: Callable[[], None]) -> None:
    """Call `main`; bad input ends in one line on stderr and status 1, Ctrl-C in status 130, a bug in its traceback."""
    try:
        main()
    except BadInput as error:
        sys.exit(f"ERROR {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def progress(items: Iterable, total: int, what: str, unit: str = "utt") -> Iterator:
    """Yield `items` under a bar with rate and time left in a terminal, or with a plain line every 15 s in a log."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit=unit, dynamic_ncols=True)
        return
    start = said = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > 15 and count < total:
            said, rate = now, count / (now - start)
            print(f"{what}: {count}/{total}, {rate:.1f} {unit}/s, {(total - count) / rate:.0f} s left", file=sys.stderr)
