#!/usr/bin/env python3
"""Stage 6, first half: the mean of some epochs of a training.

    python tools/average.py exp/demo/flow --conf conf/demo.yaml            # those of average.flow
    python tools/average.py exp/demo/llm --epoch 3 --conf conf/demo.yaml   # this one alone

reads   TRAINED/epoch_N.pt, TRAINED/epoch_N.yaml; TRAINED is named llm or flow
writes  TRAINED/average.pt (weights only, the names of the training), TRAINED/average.yaml (which epochs)
"""

from pathlib import Path

from cosyvoice_ft import checkpoint, cli
from cosyvoice_ft.conf import load_conf, to_yaml
from cosyvoice_ft.files import BadInput, whole


def choose(trained: Path, num: int, by: str, epoch: int | None) -> list[int]:
    """Return the epochs to average. Raises BadInput when there is none, or not the one that was named."""
    best = checkpoint.best_epochs(trained, len(checkpoint.epochs(trained)))
    if epoch is not None:
        if epoch not in best:
            raise BadInput(f"{trained}: no epoch_{epoch}.pt; there are {' '.join(map(str, sorted(best)))}")
        return [epoch]
    if num < 1 or by not in ("best", "last"):
        raise BadInput(f"average: num is {num}, by is '{by}'; at least 1 epoch, by best or last")
    chosen = best[:num] if by == "best" else sorted(best)[-num:]
    if len(chosen) < num:
        print(f"{trained} has {len(chosen)} epochs, fewer than {num}: all of them are averaged")
    return chosen


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--epoch", type=int, metavar="N", help="this epoch alone")
    args, overrides = cli.parse_with_conf(parser)
    settings = load_conf(args.conf, overrides)["average"]
    if args.trained.name not in settings:
        raise BadInput(f"{args.trained}: not a training; name exp/NAME/llm or exp/NAME/flow")
    chosen = choose(args.trained, **settings[args.trained.name], epoch=args.epoch)
    weights = checkpoint.average([args.trained / f"epoch_{epoch}.pt" for epoch in chosen])
    checkpoint.save(args.trained / "average.pt", weights)
    with whole(args.trained / "average.yaml") as part:
        part.write_text(to_yaml({"epochs": chosen}), encoding="utf-8")
    print(f"wrote {args.trained / 'average.pt'}: mean of {len(chosen)} epochs: {' '.join(map(str, chosen))}")


if __name__ == "__main__":
    cli.run(main)
