"""Which numbers of processes work: the sentences that refuse the others."""

from __future__ import annotations

from vflora.errors import UserError


def require_processes(size: int, sp_size: int) -> None:
    """Checks that the processes divide into groups that share samples.

    Raises:
        UserError: with the sizes that work.
    """
    if size == 1 and sp_size > 1:
        raise UserError(
            f"--sp_size {sp_size} needs {sp_size} processes: start them with "
            f"`torchrun --nproc_per_node={sp_size} train.py ...`."
        )
    if size % sp_size:
        raise UserError(f"{size} processes do not divide by --sp_size {sp_size}: use {_choices(size)}.")


def require_divisible(*, heads: int, tokens: dict[str, int], sp_size: int, flag: str = "--sp_size") -> None:
    """Checks that attention heads and video tokens divide among the processes that share a sample.

    Args:
        heads: of the transformer.
        tokens: video tokens of a clip, by what the clip is called in the message.
        sp_size: processes that share a sample.
        flag: that says how many, for the message.

    Raises:
        UserError: with the sizes that work.
    """
    working = [n for n in range(1, heads + 1) if heads % n == 0 and all(t % n == 0 for t in tokens.values())]
    choices = " or ".join(map(str, working))
    if heads % sp_size:
        raise UserError(f"{heads} attention heads do not divide by {flag} {sp_size}: use {choices}.")
    for clip, count in tokens.items():
        if count % sp_size:
            raise UserError(f"{clip} ({count} tokens) does not divide by {flag} {sp_size}: use {choices}.")


def _choices(size: int) -> str:
    return " or ".join(str(n) for n in range(1, size + 1) if size % n == 0)
