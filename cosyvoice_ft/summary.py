"""What rows say of a voice: values with intervals, differences of the same sentences, and the table of them.

A value is a ratio of sums over sentences: of errors and reference lengths, or of what was measured and 1. Its interval
is the 95 % percentile interval of the bootstrap over sentences (Bisani & Ney, 2004); a difference of two directories is
drawn over the sentences that both have, the same ones for both, so that hard sentences weigh on neither.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
    """One line of the table: the sum of column `key` over that of column `per`, by default the mean of `key`."""

    name: str
    title: str
    key: str
    per: str = ""
    digits: int = 3
    counted: bool = False  # shown as "3 of 4"


MEASURES = (
    Measure("cer", "character error", "char_errors", "chars"),
    Measure("wer", "word error", "word_errors", "words"),
    Measure("missing", "words missing", "missing", "words"),
    Measure("repeated", "words repeated", "repeated", "words"),
    Measure("similarity", "similarity, CAM++", "similarity"),
    Measure("similarity_resemblyzer", "similarity, Resemblyzer", "similarity_resemblyzer"),
    Measure("nearest", "nearest to its own speaker", "own_nearest", counted=True),
    Measure("duration", "seconds / expected", "duration"),
    Measure("ended", "ended by itself", "ended", counted=True),
    Measure("pitch", "pitch, Hz", "pitch", digits=1),
    Measure("pitch_spread", "pitch spread, semitones", "pitch_spread", digits=2),
    Measure("voiced", "voiced", "voiced"),
    Measure("level", "level, dBFS", "level", digits=1),
    Measure("clipped", "clipped samples", "clipped", digits=5),
    Measure("silence", "silence", "silence"),
    Measure("longest_silence", "longest silence, s", "longest_silence", digits=2),
    Measure("clicks", "clicks a sentence", "clicks", digits=2),
    Measure("mel_distance", "log-mel distance, dB", "mel_distance", digits=2),
    Measure("voicing_error", "voicing error", "voicing_error"),
    Measure("gross_pitch_error", "gross pitch error", "gross_pitch_error"),
    Measure("pitch_error", "pitch error, semitones", "pitch_error", digits=2),
    Measure("pesq", "PESQ", "pesq", digits=2),
    Measure("stoi", "STOI", "stoi"),
    Measure("real_time_factor", "real-time factor", ""),  # of the whole directory
)
TITLES = {measure.name: measure.title for measure in MEASURES} | {"copy": "frame by frame"}
COLUMNS = ("spoken", "base", "natural", "spoken - base", "spoken - natural")


def summary(
    rows: Mapping[str, Sequence[Mapping]], totals: Mapping[str, Mapping], resamples: int, seed: int
) -> dict[str, dict[str, dict]]:
    """Return {measure: {column: {value, low, high, n}}} of {"spoken": rows, "base": rows, "natural": rows}.

    Beside the names of `rows` there are "spoken - base" and "spoken - natural", over the sentences that both have with
    the same text, where there are two or more. low and high: None of one sentence. totals: those of synth.json.
    """
    found: dict[str, dict[str, dict]] = {}
    for measure in MEASURES:
        sums = {name: sums_of(measure, own) for name, own in rows.items()}
        cells = {name: estimate([list(own.values())], resamples, seed) for name, own in sums.items() if own}
        for other in sums.keys() - {"spoken"}:
            both = sorted(sums["spoken"].keys() & sums[other].keys())
            if len(both) > 1:
                pairs = [[sums[name][key] for key in both] for name in ("spoken", other)]
                cells[f"spoken - {other}"] = estimate(pairs, resamples, seed)
        if cells:
            found[measure.name] = {name: cells[name] for name in COLUMNS if name in cells}
    spent = {name: total["real_time_factor"] for name, total in totals.items() if "real_time_factor" in total}
    if spent:
        found["real_time_factor"] = {
            name: {"value": value, "low": None, "high": None, "n": len(rows[name])} for name, value in spent.items()
        }
    return found


def sums_of(measure: Measure, rows: Sequence[Mapping]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return {(utt, text): (numerator, denominator)} of the rows that have the measure."""
    return {
        (row["utt"], row["text"]): (row[measure.key], row[measure.per] if measure.per else 1)
        for row in rows
        if math.isfinite(row.get(measure.key, math.nan))
    }


def estimate(
    groups: Sequence[Sequence[tuple[float, float]]], resamples: int, seed: int
) -> dict[str, float | int | None]:
    """Return value, low, high, n of sum(numerators) / sum(denominators), or of the first minus the second of two."""
    sums = np.array(groups, np.float64)  # (1 or 2, N, 2)
    count = sums.shape[1]
    ratios = (sums[..., 0].sum(axis=1) / sums[..., 1].sum(axis=1)).tolist()
    drawn = []
    generator = np.random.default_rng(seed)
    for _ in range(resamples if count > 1 else 0):
        top, bottom = sums[:, generator.integers(count, size=count)].sum(axis=1).T  # (1 or 2,) each
        ratio = top / bottom
        drawn.append(ratio[0] - ratio[1] if len(ratio) > 1 else ratio[0])
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist() if drawn else (None, None)
    return {"value": ratios[0] - ratios[1] if len(ratios) > 1 else ratios[0], "low": low, "high": high, "n": count}


def table(found: Mapping[str, Mapping[str, Mapping]], notes: Sequence[str]) -> list[str]:
    """Return the lines of the table: a measure each, a column each of COLUMNS, and `notes` below."""
    names = [name for name in COLUMNS if any(name in cells for cells in found.values())]
    lines = [["", *names]]
    for measure in MEASURES:
        if measure.name in found:
            lines.append([measure.title, *(cell(measure, found[measure.name].get(name), name) for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [f"  {line}" for line in (*rows, *notes)]


def cell(measure: Measure, known: Mapping | None, name: str) -> str:
    """Return what the table says of a value; * marks a difference whose interval leaves out 0."""
    difference = " - " in name
    if known is None:
        return "-"
    if measure.counted and not difference:
        return f"{round(known['value'] * known['n'])} of {known['n']}"
    said = f"{known['value']:{'+' if difference else ''}z.{measure.digits}f}"
    if known["low"] is None:
        return said
    sure = " *" if difference and not known["low"] <= 0 <= known["high"] else ""
    return f"{said} ±{half(known):.{measure.digits}f}{sure}"


def half(known: Mapping) -> float:
    """Return half the width of an interval."""
    return (known["high"] - known["low"]) / 2
