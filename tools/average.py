#!/usr/bin/env python3
"""Stage 6, first half: the mean of the best epochs of a training.

    python tools/average.py exp/demo/flow --num 5

reads   TRAINED/epoch_N.pt, TRAINED/epoch_N.yaml
writes  TRAINED/average.pt (weights only, the names of the training), TRAINED/average.yaml (which epochs)
"""

from pathlib import Path

from cosyvoice_ft import checkpoint, cli
from cosyvoice_ft.conf import to_yaml
from cosyvoice_ft.files import BadInput, whole


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--num", type=int, default=5, help="how many epochs, those of lowest CV loss (default 5)")
    args = parser.parse_args()
    if args.num < 1:
        raise BadInput(f"--num {args.num}: at least 1 epoch is averaged")
    chosen = checkpoint.best_epochs(args.trained, args.num)
    if len(chosen) < args.num:
        print(f"{args.trained} has {len(chosen)} epochs, fewer than {args.num}: all of them are averaged")
    weights = checkpoint.average([args.trained / f"epoch_{epoch}.pt" for epoch in chosen])
    checkpoint.save(args.trained / "average.pt", weights)
    with whole(args.trained / "average.yaml") as part:
        part.write_text(to_yaml({"epochs": chosen}), encoding="utf-8")
    print(
        f"wrote {args.trained / 'average.pt'}: mean of {len(chosen)} epochs, best first: {' '.join(map(str, chosen))}"
    )


if __name__ == "__main__":
    cli.run(main)
