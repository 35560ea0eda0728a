"""The commands. Flags, help and defaults come from the configuration dataclasses; this file only parses and calls."""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from vflora import __version__
from vflora.arguments import explain, normalise
from vflora.distributed.launch import is_first, process_count
from vflora.distributed.modes import expand_mode_for
from vflora.distributed.voice import first_to_say, said_once
from vflora.errors import UserError
from vflora.help_text import HelpText
from vflora.log_lines import AboveBars
from vflora.presets import set_aside


@dataclass(frozen=True)
class Command:
    """One command of the program.

    Attributes:
        summary: one line for the overview.
        module: where its code is; imported only when the command runs.
        config: name of its configuration: a dataclass of flags, or a dataclass of such dataclasses.
        positionals: flags that may be given without their name, in order.
        config_module: where the configuration is, if not in `module`: where that needs seconds to be imported, help and
            refusals do not wait for them.
    """

    summary: str
    module: str
    config: str
    positionals: tuple[str, ...] = ()
    config_module: str = ""


COMMANDS: dict[str, Command] = {
    "data pack": Command("pictures -> shards and manifests", "vflora.data.pack", "PackConfig", ("images",)),
    "data check": Command("list everything wrong with a data set", "vflora.data.check", "CheckConfig", ("wds_root",)),
    "train-head": Command(
        "train the identity head on DINOv3", "vflora.train_head", "HeadConfig", config_module="vflora.head.config"
    ),
    "train": Command("train the LoRA: the recipe", "vflora.train", "TrainSettings", config_module="vflora.settings"),
    "encode": Command(
        "the prompts and pictures of a training, encoded ahead",
        "vflora.encode",
        "EncodeSettings",
        config_module="vflora.settings",
    ),
    "rollouts": Command(
        "the teacher's part of a training, made ahead",
        "vflora.rollouts",
        "RolloutsSettings",
        config_module="vflora.settings",
    ),
    "generate": Command(
        "picture and prompt -> video", "vflora.generate", "GenerateConfig", config_module="vflora.generate_config"
    ),
    "export": Command("checkpoint -> adapter file", "vflora.export", "ExportConfig"),
    "compare": Command(
        "base and LoRA side by side, as one page",
        "vflora.compare",
        "CompareConfig",
        config_module="vflora.compare_config",
    ),
    "watch": Command("the growing page of a run, in your browser", "vflora.watch.server", "WatchConfig", ("run_dir",)),
    "demo": Command("all of it on small models, in minutes", "vflora.demo", "DemoConfig"),
    "convert-lora": Command(
        "LoRA file -> file for another program",
        "vflora.convert_lora",
        "ConvertLoraConfig",
        ("input_path", "output_path"),
    ),
    "convert": Command(
        "model as first published -> diffusers folder",
        "vflora.convert",
        "ConvertConfig",
        ("pipeline_dir", "output_dir"),
    ),
    "download": Command("everything a run needs: commands, or the files", "vflora.download", "DownloadConfig"),
    "doctor": Command("what this machine and these folders lack", "vflora.doctor", "DoctorConfig"),
    "world render": Command("pictures and clips of the miniature world", "vflora.world.gallery", "RenderConfig"),
    "world pretrain": Command("train the models of the miniature world", "vflora.world.pretrain", "PretrainConfig"),
    "world arm": Command("one arm of the ablation with one seed", "vflora.world.ablation.arm", "ArmSettings"),
    "world ablate": Command(
        "what each part of the recipe does, measured", "vflora.world.ablation.ablate", "AblateSettings"
    ),
    "bench step": Command("time and memory of a training step", "vflora.bench.step", "BenchStepSettings"),
    "bench accuracy": Command(
        "what each approximation costs in exactness", "vflora.bench.accuracy", "BenchAccuracySettings"
    ),
    "bench attention": Command(
        "attention kernels against fp32 arithmetic, and their speed", "vflora.bench.attention", "BenchAttentionConfig"
    ),
    "bench parallel": Command(
        "what several GPUs are worth; for torchrun", "vflora.bench.parallel", "BenchParallelSettings"
    ),
    "bench generate": Command("time and memory of generating a video", "vflora.bench.generate", "BenchGenerateConfig"),
    "bench table": Command("the table of modes, row by row", "vflora.bench.table", "BenchTableConfig"),
    "bench ratio": Command("what dropped padding and shared weights gain", "vflora.bench.ratio", "BenchRatioConfig"),
}

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_GENERATE_LESS = "--group_offloading true, or a smaller --video_length"
_TRAIN_LESS = (
    "--mode low_memory, --id_decode_downsample_mode area or a smaller --train_target_resolution or --train_video_length"
)
_LESS_MEMORY = {
    "train": f"{_TRAIN_LESS}; if it was validating, a smaller --val_video_length",
    "rollouts": _TRAIN_LESS,
    "encode": _TRAIN_LESS,
    "train-head": "a smaller --pk_identities or --pk_instances, or a smaller --augment_vae_side",
    "generate": _GENERATE_LESS,
    "compare": _GENERATE_LESS,
}
"""Which flags save memory, by command."""
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where PyTorch's allocator looks for settings."""
_SAMPLING = ("generate", "compare", "bench generate")
_ANSWERS = {"-h", "--help", "-V", "--version", "--print_config"}
"""Flags that are answered by printing and nothing else: one process of a launcher is enough."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0 done, 1 found something wrong, 2 bad input."""
    start_logging()
    _quiet_libraries()
    words = list(sys.argv[1:] if arguments is None else arguments)
    answers = bool(_ANSWERS & {*words})
    if answers and not is_first():
        return 0
    if words and not answers:
        return _main(words)
    try:
        try:
            return _main(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(words: list[str]) -> int:
    if words in (["--version"], ["-V"]):
        print(f"vflora {__version__}")
        return 0
    name, rest = _split_command(words)
    if name is None:
        family, rest = (words[0], words[1:]) if words and _family(words[0]) else ("", words)
        asked = not rest or rest[0] in ("-h", "--help")
        print(_overview(family))
        if not asked:
            print(f"vflora: {_no_command(words)}", file=sys.stderr)
        return 0 if asked and rest else 2
    try:
        return run_command(name, rest) or 0
    except UserError as error:
        if first_to_say(str(error)):
            print(f"vflora: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        if first_to_say("disk full"):
            where = f" that holds {error.filename}" if error.filename else ""
            print(f"vflora: the disk{where} is full: make room and run the command again.", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if name not in _LESS_MEMORY or type(error).__name__ != "OutOfMemoryError":
            raise
        if first_to_say("out of memory"):
            print(f"vflora: {str(error).partition('. GPU')[0]}: use {_LESS_MEMORY[name]}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first_to_say("interrupted"):
            print("vflora: interrupted", file=sys.stderr)
        return 130


def run_command(name: str, arguments: Sequence[str]) -> int | None:
    """Parses the flags of one command and runs it.

    Raises:
        UserError: for settings or input that the command refuses.
        SystemExit: with code 2 for flags that cannot be parsed, 0 after --help.
    """
    result = execute(name, parse(name, arguments))
    return result if isinstance(result, int) else None


def execute(name: str, config: Any) -> Any:
    """Runs a command with its configuration, and returns what it made.

    Raises:
        UserError: for settings or input that the command refuses.
    """
    if name in _SAMPLING:
        _let_memory_grow()
    return importlib.import_module(COMMANDS[name].module).run(config)


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Returns the configuration of a command for the given flags."""
    config_class = config_class_of(name)
    groups = config_groups(config_class)
    parser = build_parser(name, groups)
    processes = process_count()
    given = set_aside(normalise(arguments, groups, COMMANDS[name].positionals), groups)
    complete = expand_mode_for(processes, given, groups)
    try:
        values = parser.parse_args(complete)
    except ArgumentError as error:
        raise UserError(f"{explain(str(error), groups)} (`vflora {name} --help` lists the flags).") from error
    built = [cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in groups]
    return built[0] if groups == [config_class] else config_class(*built)


def config_class_of(name: str) -> type:
    """Returns the configuration of a command."""
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.config_module or command.module), command.config)


def config_groups(config_class: type) -> list[type]:
    """Returns the dataclasses of flags that a command's configuration is made of."""
    hints = get_type_hints(config_class)
    members = [hints[f.name] for f in fields(config_class)]
    return members if members and all(is_dataclass(m) for m in members) else [config_class]


def build_parser(name: str, groups: list[type]) -> ArgumentParser:
    """Builds the parser of one command, one help group per dataclass."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    nameless = "".join(f" [{flag.upper()}]" for flag in COMMANDS[name].positionals)
    parser = ArgumentParser(
        prog=f"vflora {name}",
        usage=f"vflora {name}{nameless} [flags]",
        description=COMMANDS[name].summary,
        formatter_class=HelpText,
        exit_on_error=False,
        allow_abbrev=False,  # what one flag says about others is read from whole names
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings; flags win over it")
    for group in groups:
        parser.add_class_arguments(group, nested_key=None, as_group=True)
    return parser


def _split_command(words: list[str]) -> tuple[str | None, list[str]]:
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return name, words[length:]
    return None, words


def _no_command(words: list[str]) -> str:
    given = " ".join(word for word in words[:2] if not word.startswith("-")) or words[0]
    near = [name for asked in (given, words[0]) for name in difflib.get_close_matches(asked, COMMANDS, n=1)]
    return f"there is no command {given!r}: " + (f"write `vflora {near[0]}`." if near else "choose one of these.")


def _family(word: str) -> dict[str, Command]:
    """Returns the commands whose first of two words this is."""
    return {name: command for name, command in COMMANDS.items() if name.startswith(f"{word} ")}


def _overview(family: str) -> str:
    """Lists a family of commands, or all of them."""
    listed = _family(family) or COMMANDS
    width = max(map(len, listed)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in listed.items()]
    usage = " ".join(filter(None, ["vflora", family, "COMMAND"]))
    return "\n".join(
        [
            f"usage: {usage} [flags]      ({usage} --help lists the flags)",
            "",
            "Video-Free LoRA: teaches an image-to-video model new characters from stills.",
            "",
            *lines,
        ]
    )


def start_logging() -> None:
    """Prints what the first process of a launcher logs, and warnings of any, each once."""
    level = logging.INFO if is_first() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[AboveBars()])
    for handler in logging.getLogger().handlers:
        handler.addFilter(said_once)


def _quiet_libraries() -> None:
    """Keeps notes of libraries about themselves out of the user's terminal; warnings of ours stay."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    for library in ("httpx", "PIL", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _let_memory_grow() -> None:
    """Has PyTorch extend pieces of GPU memory instead of adding others, unless the user has settings of his own.

    A decoder asks for pieces of GiB, each of another size: 121 frames at 480p, which take 9.9 GiB, did not fit into 11
    without this, and do with it. Training, whose CUDA graphs hold memory in another way, was measured without.
    """
    if sys.platform == "linux" and not any(variable in os.environ for variable in _ALLOCATOR):
        # The older name, which every version reads.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def entry(name: str) -> Callable[[], int]:
    """Returns a main function for one command, for the scripts that carry the reference's names."""
    return lambda: main([*name.split(), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
