"""One process or several: who am I, add up, agree."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_together

from lape.errors import LapeError
from lape.train.distributed import join_world, on_main, rank_and_size, sum_over_ranks


def add_up_and_fail(folder: Path) -> None:
    warnings.simplefilter("error")
    with join_world("cpu") as world:
        total = sum_over_ranks(torch.tensor([world.rank + 1.0, 0.1])).tolist()
        ran: list[int] = []
        on_main(lambda: ran.append(world.rank))

        def fail() -> None:
            raise PermissionError(13, "Permission denied", "there")

        try:
            on_main(fail)
            message = "none"
        except LapeError as error:
            message = str(error)
        (folder / f"{world.rank}.json").write_text(json.dumps([world.size, total, ran, message]))
    assert not dist.is_initialized()


def test_a_single_process_opens_no_group():
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.device, world.is_main) == (0, 1, torch.device("cpu"), True)
        assert not dist.is_initialized()
        assert rank_and_size() == (0, 1)
        assert sum_over_ranks(torch.tensor([0.5, 2.0])).tolist() == [0.5, 2.0]


def test_main_reports_a_full_disk_as_a_users_error():
    def fail() -> None:
        raise OSError(28, "No space left on device", "checkpoint.pth")

    with pytest.raises(LapeError, match="No space left"):
        on_main(fail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_names_the_fix():
    with pytest.raises(LapeError, match="--device cpu"), join_world("cuda"):
        pass


def test_a_device_that_does_not_work_names_the_fix():
    with pytest.raises(LapeError, match="--device cpu"), join_world("meta:x"):
        pass


@pytest.mark.distributed
def test_two_processes_add_up_and_fail_together(tmp_path):
    run_together(2, add_up_and_fail, tmp_path)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [t[:2] for t in told] == [[2, [3.0, pytest.approx(0.2)]]] * 2
    assert [t[2] for t in told] == [[0], []], "only rank 0 runs the action"
    assert all("Permission denied" in t[3] for t in told), "both ranks raise what went wrong on rank 0"
