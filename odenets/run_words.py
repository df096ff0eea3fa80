"""Command lines of runs: the options that they contain, and whether these determine what to run."""

from collections.abc import Sequence

# Options that mark the `predict` of a run, not of images, besides a configuration and those of model, data and trainer.
OF_A_RUN = {"--run_dir", "--threads", "--seed_everything", "--weights", "--return_predictions"}


def names(words: Sequence[str]) -> list[str]:
    """Returns the names of the options on a command line, in order; words that are not options stay as they are.

    Example:
        >>> names(["test", "-cphotos.yaml", "--ckpt_path=last"])
        ['test', '-c', '--ckpt_path']
    """
    # argparse accepts the value of a short option after a space, an equals sign, or nothing.
    return ["-c" if word.startswith("-c") else word.partition("=")[0] for word in words]


def option(words: Sequence[str], name: str) -> str | None:
    """Returns the last value of an option on a command line, given as two words or with an equals sign.

    Example:
        >>> option(["test", "--ckpt_path", "last", "--ckpt_path=best"], "--ckpt_path")
        'best'
    """
    found = None
    for i, word in enumerate(words):
        if word.startswith(f"{name}="):
            found = word.partition("=")[2]
        elif word == name and i + 1 < len(words):
            found = words[i + 1]
    return found


def is_configured(words: Sequence[str]) -> bool:
    """Whether a command line determines what it runs: by a configuration, or by classes for the network and the data.

    Example:
        >>> is_configured(["test", "--model=Plain", "--data=Digits"]), is_configured(["test", "--data.root", "new"])
        (True, False)
    """
    given = set(names(words))
    return bool(given & {"-c", "--config"}) or given >= {"--model", "--data"}


def is_over_data(words: Sequence[str]) -> bool:
    """Whether a `predict` is that of a run, over a data module, rather than of images.

    It is if it is configured, has other options of a run, or names a checkpoint, whose configuration is then used, but
    no image.

    Example:
        >>> is_over_data(["predict", "--ckpt_path", "last"]), is_over_data(["predict", "--ckpt_path", "last", "a.png"])
        (True, False)
    """
    given = names(words[1:])
    if is_configured(words) or any(n in OF_A_RUN or n.startswith(("--model", "--data", "--trainer")) for n in given):
        return True
    return given[:1] == ["--ckpt_path"] and len(given) == (1 if "=" in words[1] else 2)
