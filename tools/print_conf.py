#!/usr/bin/env python3
"""Print the settings that a speaker's conf and the command line make together, defaults included.

    python tools/print_conf.py --conf conf/demo.yaml --train.lr 2e-4
    python tools/print_conf.py --conf conf/demo.yaml name pretrained_dir        # these values, one a line

An unknown key, at any depth, is an error that names it.
"""

from cosyvoice_ft import cli, conf
from cosyvoice_ft.files import BadInput


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="dotted key of a value to print")
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    if not args.keys:
        print(conf.to_yaml(settings), end="")
    for key in args.keys:
        value = settings
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise BadInput(f"'{key}' is no key of {args.conf}")
            value = value[name]
        print("" if value is None else value)


if __name__ == "__main__":
    cli.run(main)
