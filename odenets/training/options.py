"""The valid values of options, and the options that may change between a run and its resumption.

Numbers are checked by the last word of their option's name, before any data is opened. On resume, an option that
determines the result must have the value that the checkpoint was trained with, unless the command line gives another.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from schemes import SchemeError

from ..config_files import flat

_Rule = tuple[Callable[[Any], bool], str]
_POSITIVE: _Rule = (lambda v: v >= 1, "1 or more")
_NOT_NEGATIVE: _Rule = (lambda v: v >= 0, "0 or more")
_SHARE: _Rule = (lambda v: 0 <= v < 1, "a share, 0 or more and below 1")
_LIMIT: _Rule = (lambda v: v >= -1, "-1 (no limit) or more")
# By the last word of an option's name.
RULES: dict[str, _Rule] = {
    **dict.fromkeys(("batch_size", "threads", "accumulate_grad_batches", "num_nodes", "size"), _POSITIVE),
    **dict.fromkeys(("check_val_every_n_epoch", "every_n_train_steps"), _POSITIVE),
    **dict.fromkeys(("lr", "max_lr", "weight_decay", "step_weight_decay", "eps", "warmup", "final"), _NOT_NEGATIVE),
    **dict.fromkeys(("num_workers", "num_sanity_val_steps", "log_every_n_steps", "gradient_clip_val"), _NOT_NEGATIVE),
    **dict.fromkeys(("momentum", "dampening", "label_smoothing", "holdout"), _SHARE),
    **dict.fromkeys(("max_epochs", "max_steps"), _LIMIT),
    "limit_train_batches": (lambda v: v > 0, "a number of batches, or a share, above 0"),
    "seed_everything": (lambda v: 0 <= v < 2**32, "0 to 4294967295"),
}
# Options that no figure of a run depends on: where things are, what is printed and saved.
HARMLESS = re.compile(
    r"ckpt_path|run_dir|threads|(checkpoint|last)\..*|data\.(num_workers|download|cache)"
    r"|trainer\.(accelerator|logger|enable_\w+|default_root_dir|profiler|log_every_n_steps|detect_anomaly|benchmark"
    r"|inference_mode|num_sanity_val_steps|limit_(test|predict)_batches|model_registry)(\..*)?"
)
# Options that may change silently when a run is resumed: the above, the amount of hardware, the duration, and the
# evaluation. Weights are only read at the start of a run.
FREE = re.compile(
    rf"{HARMLESS.pattern}|weights(_only)?|adapt\..*|trainer\.(strategy|devices|num_nodes|fast_dev_run|barebones|plugins"
    r"|max_time|use_distributed_sampler|limit_val_batches|reload_dataloaders_every_n_epochs)(\..*)?"
)


def check_groups(options: Any) -> None:
    """Refuses null for a group of options, which the parser would accept.

    Args:
        options: of the subcommand, as parsed.

    Raises:
        SchemeError: a group is null; the message names it.
    """
    for name in ("model", "data", "trainer", "checkpoint", "last", "adapt"):
        if name in options and options[name] is None:
            raise SchemeError(
                f"{name} is null, and has options of its own\n  Leave it out, or give some: {name}: {{...}}"
            )


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuses numbers that no run can have.

    Args:
        config: the resolved configuration, nested.

    Raises:
        SchemeError: a number that is NaN or infinite, or outside the range of its option.
    """
    for name, value in flat(config).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        short = short_name(name)
        if not math.isfinite(value):
            raise SchemeError(f"{short} is {value}, which is no finite number\n  Give a number: --{short} VALUE")
        holds, wanted = RULES.get(name.rpartition(".")[2], (None, ""))
        if holds is not None and not holds(value):
            raise SchemeError(f"{short} is {value}; wanted {wanted}\n  Give another: --{short} VALUE")


def short_name(name: str) -> str:
    """An option as it is typed: `model.optimizer.lr` for `model.init_args.optimizer.init_args.lr`."""
    return name.replace("init_args.", "")


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], free: re.Pattern[str] = FREE
) -> dict[str, tuple[Any, Any]]:
    """Returns the options that determine the result and differ, by their short names: (before, now).

    Args:
        before: a configuration, nested.
        now: another.
        free: options that are ignored.
    """
    old, new = flat(before), flat(now)
    found = {}
    for name in [*new, *(n for n in old if n not in new)]:
        a, b = old.get(name), new.get(name)
        # An option that one side lacks is from another release, unless it is a part of one that both have.
        known = (name in old and name in new) or _is_part(name, new if name in old else old)
        if differ(a, b) and known and not free.fullmatch(short_name(name)):
            found[short_name(name)] = (a, b)
    return found


def _is_part(name: str, other: Mapping[str, Any]) -> bool:
    """Whether an option that one side lacks is a part of one that it has: an element, a class, a key of one's own.

    Args:
        name: of the option.
        other: the options of the side that lacks it.
    """
    parts = name.split(".")
    if parts[-1].isdigit() or parts[-1] == "class_path":
        return True
    # None, {} or a plain value there, where a mapping is here; a class that had no options may have some by now.
    if any(".".join(parts[:n]) in other for n in range(1, len(parts)) if parts[n - 1] != "init_args"):
        return True
    at = max((i for i, part in enumerate(parts) if part in ("init_args", "dict_kwargs")), default=len(parts))
    # Below an option of a class the keys are the user's, and below dict_kwargs all of them are.
    above = parts[:at] if parts[at : at + 1] == ["dict_kwargs"] else parts[: at + 2]
    return len(above) < len(parts) and any(other_name.startswith(".".join([*above, ""])) for other_name in other)


def differ(a: Any, b: Any) -> bool:
    """Whether two values of an option differ; 1 and 1.0 do, since one batch and all of them are not the same."""
    return a != b or (isinstance(a, bool | int | float) and type(a) is not type(b))


def given(words: Sequence[str]) -> set[str]:
    """The short names of the options that are given on the command line itself, not in a file."""
    # A plus sign appends to a list.
    return {short_name(word[2:].partition("=")[0].removesuffix("+")) for word in words if word.startswith("--")}


def check_resumed(before: Mapping[str, Any], now: Mapping[str, Any], words: Sequence[str], name: str) -> None:
    """Refuses to resume with options other than the checkpoint's, unless the command line gives them.

    Args:
        before: the configuration that the checkpoint was trained with.
        now: the configuration of this run.
        words: its command line.
        name: of the checkpoint.

    Raises:
        SchemeError: options that differ, with both values.
    """
    options = given(words)
    for option, (a, b) in changes(before, now).items():
        if not any(option == o or option.startswith(f"{o}.") for o in options):
            raise SchemeError(
                f"{option} is {b} now, and {name} was trained with {a}\n"
                f"  Say which on the command line, --{option} {b} or {a}; or train anew, without --ckpt_path"
            )
