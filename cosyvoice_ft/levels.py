"""How loud a wave is, in frames of 20 ms: what is silent, and stage 0's trimming and levelling.

wav: float32 array (T,) in [-1, 1] at `rate` Hz.
"""

import numpy as np

FRAME = 0.02  # seconds: silence is counted in these
SILENCE = 0.01  # of the loudest frame: 40 dB below it
LOUDEST = 0.95  # the peak that level() never exceeds


def frame_levels(wav: np.ndarray, rate: int) -> np.ndarray:
    """Return the RMS of each whole frame of 20 ms, at least one."""
    samples = round(FRAME * rate)
    whole_frames = wav[: max(1, len(wav) // samples) * samples]
    return np.sqrt(np.square(whole_frames).reshape(max(1, len(wav) // samples), -1).mean(axis=1))


def silent_frames(wav: np.ndarray, rate: int) -> np.ndarray:
    """Tell of each frame whether it lies 40 dB or more below the loudest."""
    levels = frame_levels(wav, rate)
    return levels <= SILENCE * levels.max()


def trim(wav: np.ndarray, rate: int, seconds: float) -> np.ndarray:
    """Cut the silent frames at both ends down to `seconds`."""
    loud = np.flatnonzero(~silent_frames(wav, rate)) * FRAME
    if not len(loud):
        return wav
    return wav[max(0, round((loud[0] - seconds) * rate)) : round((loud[-1] + FRAME + seconds) * rate)]


def level(wav: np.ndarray, rate: int, dbfs: float) -> np.ndarray:
    """Scale so that the RMS of all frames that are not silent is `dbfs`, or the peak 0.95, whichever is less loud."""
    levels = frame_levels(wav, rate)
    rms = np.sqrt(np.square(levels[levels > SILENCE * levels.max()]).mean())
    return wav * np.float32(min(10 ** (dbfs / 20) / rms, LOUDEST / np.abs(wav).max()))
