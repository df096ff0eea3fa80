"""Which extra brings what this package imports beside torch and einops: the table behind every message about it."""

import importlib.util
import sys

# By the names under which they are imported; the first extra that brings one, where several do.
EXTRAS = {
    **dict.fromkeys(
        (
            *("datasets", "fsspec", "huggingface_hub", "jsonargparse", "lightning", "numpy", "PIL", "pyarrow", "rich"),
            *("safetensors", "shtab", "sklearn", "tensorboard", "torchmetrics", "typeshed_client", "yaml"),
        ),
        "train",
    ),
    "torchdiffeq": "ode",
    "hypothesis": "testing",
    "matplotlib": "analysis",
    **dict.fromkeys(("filelock", "ray", "scipy"), "study"),
    **dict.fromkeys(("accelerate", "peft", "transformers"), "hf"),
    "pycocotools": "detect",
    "timm": "timm",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
}


class MissingExtra(ModuleNotFoundError):
    """Something is not installed that an extra brings; the message has the line that installs it."""


def install(extra: str) -> str:
    """The line that installs an extra.

    Example:
        >>> install("train")
        'pip install "odenets[train]"'
    """
    return f'pip install "odenets[{extra}]"'


def require(extra: str, what: str) -> None:
    """Refuses to go on where a package of an extra is not installed; nothing is imported.

    Args:
        extra: the extra.
        what: who needs it, for the message.

    Raises:
        MissingExtra: one is missing.
    """
    for module, brought_by in EXTRAS.items():
        if brought_by == extra and not _installed(module):
            raise MissingExtra(f"{what} needs the package {module}: {install(extra)}", name=module)


def _installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None  # None is how Python notes what must not be imported
    return importlib.util.find_spec(module) is not None


def explained(error: ImportError) -> tuple[str, str] | None:
    """The two lines that an import error ends a command in: what is missing, and what installs it.

    Args:
        error: as Python raises it, or one whose message has the line already.

    Returns:
        None where no extra brings what is missing: that is a fault of the program, or of the user's own module.
    """
    cause, colon, remedy = str(error).rpartition(": ")
    if colon and remedy.startswith("pip install "):
        return cause, remedy
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f"this needs the package {module}, which is not installed", install(EXTRAS[module])
