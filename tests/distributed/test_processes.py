import pytest
import torch

from vflora.distributed.divisible import require_divisible, require_processes
from vflora.distributed.processes import World, start
from vflora.errors import UserError


def test_a_process_by_itself_is_a_world_of_one_that_changes_nothing():
    world = start(1, torch.device("cpu"))
    gradient = torch.randn(3)
    before = gradient.clone()
    world.reduce_gradients([gradient])
    assert world == World()
    assert torch.equal(gradient, before)
    assert world.agree(True)
    assert not world.agree(False)
    assert world.gather_over_data("x") == ["x"]
    assert world.from_main(lambda: 7) == 7
    assert world.aside() is world
    world.close()


@pytest.mark.parametrize(
    ("size", "sp_size", "sentence"),
    [
        (1, 2, "--sp_size 2 needs 2 processes: start them with `torchrun --nproc_per_node=2"),
        (6, 4, "6 processes do not divide by --sp_size 4: use 1 or 2 or 3 or 6"),
        (2, 4, "2 processes do not divide by --sp_size 4: use 1 or 2"),
    ],
)
def test_processes_that_do_not_divide_are_refused_with_the_sizes_that_work(size, sp_size, sentence):
    with pytest.raises(UserError, match=sentence):
        require_processes(size, sp_size)


def test_heads_and_tokens_that_do_not_divide_are_refused_with_the_sizes_that_work():
    clip = {"480x848 with 17 frames": 5 * 30 * 53}
    require_divisible(heads=16, tokens=clip, sp_size=2)
    with pytest.raises(
        UserError, match=r"480x848 with 17 frames \(7950 tokens\) does not divide by --sp_size 4: use 1 or 2\."
    ):
        require_divisible(heads=16, tokens=clip, sp_size=4)
    with pytest.raises(UserError, match=r"16 attention heads do not divide by --sp_size 3: use 1 or 2 or 4 or 8\."):
        require_divisible(heads=16, tokens={"480x832 with 17 frames": 5 * 8 * 3}, sp_size=3)


def test_four_processes_two_by_two_agree_gather_and_reduce(in_processes):
    def work(world):
        gradient = torch.full((2, 3), float(world.rank))
        other = torch.full((4,), 10.0 * world.rank)
        world.reduce_gradients([gradient, other])
        return {
            "place": (world.dp_rank, world.dp_size, world.is_main),
            "one said yes": world.agree(world.rank == 3),
            "nobody did": world.agree(False),
            "batch order": world.gather_over_data(f"samples of {world.dp_rank}"),
            "told": world.from_main(lambda: f"by {world.rank}"),
            "beside": world.aside().agree(world.rank == 1),
            "gradients": (gradient.unique().tolist(), other.unique().tolist()),
        }

    answers = in_processes(4, work, sp_size=2)
    assert [a.pop("place") for a in answers] == [(0, 2, True), (0, 2, False), (1, 2, False), (1, 2, False)]
    assert all(a == answers[0] for a in answers)
    assert answers[0] == {
        "one said yes": True,
        "nobody did": False,
        "batch order": ["samples of 0", "samples of 1"],
        "told": "by 0",
        "beside": True,
        # the sum over each pair that shares a sample, then the mean over the two pairs: (0 + 1 + 2 + 3) / 2
        "gradients": ([3.0], [30.0]),
    }


def test_what_the_main_process_refuses_all_refuse(in_processes):
    def refuse():
        raise UserError("the disk is full")

    def work(world):
        try:
            world.from_main(refuse)
        except UserError as error:
            return str(error)

    assert in_processes(2, work) == ["the disk is full"] * 2
