"""The extras that install this package's imports besides torch and einops: the table behind messages about them."""

import importlib.util
import sys

# By import name; the first extra where several install a package.
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
    """A package of an extra is not installed; the message has the line that installs it."""


def install(extra: str) -> str:
    """Returns the command that installs an extra.

    Example:
        >>> install("train")
        'pip install "odenets[train]"'
    """
    return f'pip install "odenets[{extra}]"'


def require(extra: str, what: str) -> None:
    """Refuses to continue if a package of an extra is not installed; imports nothing.

    Args:
        extra: the extra.
        what: the feature that needs it, for the message.

    Raises:
        MissingExtra: one is missing.
    """
    for module, brought_by in EXTRAS.items():
        if brought_by == extra and not _installed(module):
            raise MissingExtra(f"{what} needs the package {module}: {install(extra)}", name=module)


def _installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None  # Python marks a blocked import by None
    return importlib.util.find_spec(module) is not None


def explained(error: ImportError) -> tuple[str, str] | None:
    """Returns the two lines with which an import error ends a command: what is missing, and what installs it.

    Args:
        error: as Python raises it, or one whose message already has the command.

    Returns:
        None if no extra installs what is missing: a fault of the program, or of the user's own module.
    """
    cause, colon, remedy = str(error).rpartition(": ")
    if colon and remedy.startswith("pip install "):
        return cause, remedy
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f"this needs the package {module}, which is not installed", install(EXTRAS[module])
