"""Available memory: the smallest of what the machine and the control groups leave."""

import sys
from pathlib import Path

import pytest

from equikernel.memory import available_memory, format_bytes

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n"}


def test_this_machine_has_memory() -> None:
    assert 2**20 < available_memory() < 2**60


def test_without_control_groups_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert available_memory(write(tmp_path, MACHINE)) == 8 * GIB


def test_a_version_2_limit_above_this_group_counts_and_file_cache_is_free(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        MACHINE
        | {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/container/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/pod/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}\n",
        },
    )
    assert available_memory(root) == 2 * GIB


def test_a_version_1_limit_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        MACHINE
        | {
            "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{GIB}\n",
        },
    )
    assert available_memory(root) == GIB


def test_more_used_than_the_limit_is_nothing_left(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "1000\n",
            "sys/fs/cgroup/memory.current": "2000\n",
        },
    )
    assert available_memory(root) == 0


def test_without_proc_the_free_physical_memory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < available_memory(tmp_path) < sys.maxsize
    monkeypatch.delattr("os.sysconf")
    assert available_memory(tmp_path) == sys.maxsize


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 * GIB, "3.0 GiB"), (2**40 * 5, "5.0 TiB")],
)
def test_bytes_are_written_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
