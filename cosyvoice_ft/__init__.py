"""Fine-tuning of CosyVoice2 and CosyVoice3: the nouns of the recipe; run.sh is its table of contents, tools/ its verbs.

Importing this package imports nothing heavy and does one thing: a finder on sys.meta_path lets torchaudio be imported
where its native library does not load. torchaudio 2.11.0 links CUDA and compares CUDA versions, so that beside a CPU
build of torch (or another CUDA) `import torchaudio` fails, and with it the import of transformers' models. What the
recipe uses of torchaudio, resampling and Kaldi's filterbank, is plain PyTorch. Where the library loads, it is loaded.
"""

import sys
from importlib.machinery import PathFinder, SourceFileLoader

__version__ = "0.1.0"


class _TorchaudioExtension(SourceFileLoader):
    """Finds and loads the one module torchaudio._extension, which loads the native library when it is executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "torchaudio._extension" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = cls(spec.loader.name, spec.loader.path)
        return spec

    def exec_module(self, module):
        try:
            super().exec_module(module)
        except (OSError, RuntimeError, ImportError):
            module._IS_TORCHAUDIO_EXT_AVAILABLE = module._IS_ALIGN_AVAILABLE = False
            module.fail_if_no_align = _unavailable


def _unavailable(function):
    """Stand in for a function of torchaudio that runs in the native library."""

    def fail(*_args, **_kwargs):
        raise RuntimeError(f"torchaudio's {function.__name__} needs its native library, which does not load here")

    return fail


sys.meta_path.insert(0, _TorchaudioExtension)
