import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path

import cloudpickle
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach out for weights
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Shells start background jobs like this, and what tests start would inherit it and never see a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from diffusers.utils import logging as diffusers_logging  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import vflora.train  # noqa: E402
from vflora.cli import parse  # noqa: E402
from vflora.data.pack import PackConfig  # noqa: E402
from vflora.data.pack import run as pack  # noqa: E402
from vflora.models.projection_head import HeadSpec, new_head, save_head  # noqa: E402
from vflora.models.random_weights import small_dinov3_vit, small_pipeline, small_transformer  # noqa: E402
from vflora.train import run as train  # noqa: E402
from vflora.types import Conditions  # noqa: E402

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# A line for each tensor that is saved would bury what a failed test has to say.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.INFO)


def pytest_collection_modifyitems(items):
    """The long tests first: one that began last would leave the other cores without work; without CUDA no GPU's."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a command of the program computes."""
    return request.param


@pytest.fixture
def transformer():
    return small_transformer()


@pytest.fixture
def make_conditions():
    """Random conditions for `small_transformer`: text lengths, byT5 lengths, and a first frame."""

    def make(lengths=(7,), lengths_2=None, *, size=(4, 4), seed=0) -> Conditions:
        generator = torch.Generator().manual_seed(seed)
        lengths_2 = lengths_2 or (0,) * len(lengths)

        def text(sizes, channels):
            value = torch.randn(len(sizes), max(sizes), channels, generator=generator)
            for row, length in zip(value, sizes, strict=True):
                row[length:] = 0
            return value

        return Conditions(
            prompt_embeds=text(lengths, 16),
            prompt_lengths=tuple(lengths),
            prompt_embeds_2=text(lengths_2, 32),
            prompt_lengths_2=tuple(lengths_2),
            image_embeds=torch.randn(len(lengths), 6, 12, generator=generator),
            first_frame=torch.randn(len(lengths), 4, 1, *size, generator=generator),
        )

    return make


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """A random pipeline, a random DINOv3 and a random head for it, in the folders that users have."""
    folder = tmp_path_factory.mktemp("models")
    small_pipeline().save_pretrained(folder / "pipeline")
    dino = small_dinov3_vit()
    dino.save_pretrained(folder / "dino")
    spec = HeadSpec(dino.config.hidden_size, (8,))
    save_head(new_head(spec, torch.Generator().manual_seed(0)), folder / "head.safetensors")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Twelve pictures of three characters, packed: two colours each, so that they differ."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for character in ("red fox", "blue whale", "green frog"):
        (folder / "images" / character).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
            picture = Image.fromarray(pixels.numpy()).resize((64, 64), Image.Resampling.BICUBIC)
            picture.save(folder / "images" / character / f"{number}.png")
    pack(
        PackConfig(
            folder / "images", folder / "wds", "species", resolution="64x64", val_split=0.25, duplicate_distance=-1
        )
    )
    return folder / "wds"


@pytest.fixture(scope="session")
def make_train_flags(small_models, small_data):
    """The flags of a training run that takes a fraction of a second per step, by its folder."""
    return lambda folder: [
        *("--pipeline_dir", str(small_models / "pipeline")),
        *("--dino_model_dir", str(small_models / "dino")),
        *("--dino_head_path", str(small_models / "head.safetensors")),
        *("--wds_root", str(small_data), "--metadata_key", "species"),
        *("--output_dir", str(folder)),
        *("--train_target_resolution", "32x32", "--train_video_length", "9", "--num_inference_steps", "6"),
        *("--lora_r", "4", "--lora_alpha", "4", "--dtype", "fp32", "--num_workers", "0"),
        *("--condition_lookahead", "2", "--max_train_steps", "4", "--warmup_steps", "0", "--learning_rate", "1e-2"),
        *("--log_every_steps", "1", "--logger", "none", "--device", "cpu", "--rollout_guidance_scale", "1"),
        # Of so few points only the last has little noise; by place the deep point varies.
        *("--id_timestep_frac_low", "0.6", "--id_timestep_frac_high", "0.85"),
    ]


@pytest.fixture
def train_flags(make_train_flags, tmp_path):
    """The same for a run in tmp_path / "run"."""
    return make_train_flags(tmp_path / "run")


@pytest.fixture(scope="session")
def trained_run(make_train_flags, tmp_path_factory):
    """The folder of a real training of four steps, validated after the second and the last, with TensorBoard."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--enable_validation", "--val_num_samples", "2", "--val_video_length", "5", "--val_every_steps", "2"]
    train(parse("train", [*make_train_flags(folder), *flags, "--logger", "tensorboard"]))
    return folder


@pytest.fixture(scope="session")
def losses():
    """Reads the losses of a run's folder to the last bit, by step."""
    names = ("loss/distill", "loss/identity", "gradient_norm")

    def read(folder):
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: [float(row[n]).hex() for n in names] for row in rows if "loss/distill" in row}

    return read


# Real processes, quickly: a forkserver imports everything once and forks from there. The process of the tests itself
# must not fork: torch has computed in it, and a child could wait for ever for a thread that it did not inherit.
# Importing looks for a GPU, and where there is one, nothing that was forked after that may use it.
TESTS = f"{Path(__file__).parent}{os.sep}"
PROCESSES = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PROCESSES.set_forkserver_preload(
    [
        *("cloudpickle", "vflora.cli", "vflora.train", "vflora.train_head", "vflora.rollouts", "vflora.generate"),
        *("vflora.compare", "transformers.models.dinov3_vit.modeling_dinov3_vit", "PIL.PngImagePlugin"),
    ]
)


class ByValue:
    """A function that reaches a process which cannot import the module it is from."""

    def __init__(self, function):
        for module in list(sys.modules.values()):
            if (getattr(module, "__file__", None) or "").startswith(TESTS):
                cloudpickle.register_pickle_by_value(module)
        self._content = cloudpickle.dumps(function)

    def __reduce__(self):
        return cloudpickle.loads, (self._content,)


def _as_in_tests(log, work, *arguments):
    multiprocessing.set_start_method(None, force=True)  # it starts its own processes as every program does
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    if log is not None:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
    work(*arguments)


@pytest.fixture(scope="session")
def fork():
    """Starts a function in a process of its own, whose stderr goes to the file `log`, and returns the process.

    Functions of the tests travel by value, closures too; a test that replaces a part of the program does so inside
    the function it sends.
    """

    def start(work, *arguments, log=None):
        process = PROCESSES.Process(target=ByValue(_as_in_tests), args=(log, ByValue(work), *arguments))
        process.start()
        return process

    return start


def _train_until_killed(flags):
    learn = vflora.train.learn

    def killed(training, lesson, step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(training, lesson, step, *rest)

    vflora.train.learn = killed
    train(parse("train", flags))


@pytest.fixture
def train_until_killed(fork, tmp_path):
    """Trains in a process of its own that is killed, as a power cut would, when three steps are done."""

    def start(flags):
        process = fork(_train_until_killed, flags, log=tmp_path / "killed.log")
        process.join(250)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "killed.log").read_text()[-2000:]

    return start
