"""`langmill data prepare` on a Ray cluster of two nodes against one process: the same bytes, also when parts of it die.

    scripts/bench ray_cluster [--megabytes 12]        needs pip install "langmill[cluster]"

Prepares rows and pages with --engine native, then four times with --engine ray on two nodes of this machine that
listen on loopback addresses (127.0.0.1 itself Ray would replace by the outer one): undisturbed; with a worker killed
(SIGKILL) in the middle; with the command itself killed, then run again; and with a whole node killed. Every output
folder must equal the first to the byte. Prints one JSON object; exit code 1 where one differs. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from langmill.common.errors import MissingExtra
from langmill.jobs.manual import manual

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def write(folder: Path, megabytes: float) -> None:
    """Rows with copies among them, and a few hundred pages, which are read in guarded processes."""
    (folder / "pages").mkdir(parents=True)
    rng, words = random.Random(0), " ".join(d.text for d in manual().documents).split()
    size, texts = 0, list[str]()
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            start = rng.randrange(len(words) - 400)
            text = rng.choice(texts) if texts and rng.random() < 0.1 else " ".join(words[start : start + 300])
            texts = [*texts[-500:], text]
            size += file.write(json.dumps({"text": f"{text} ask ada.{rng.randrange(99)}@example.org"}) + "\n")
    for i in range(300):
        start = rng.randrange(len(words) - 400)
        text = " ".join(words[start : start + 200]).replace("<", "&lt;")
        page = f"<html><body><p>{text}</p></body></html>"
        (folder / "pages" / f"{i:03}.html").write_text(page, encoding="utf-8")


def command(raw: Path, out: Path, *more: str) -> list[str]:
    small = ["read.unit_bytes=300000", "read.unit_files=20"]
    return [
        *(sys.executable, "-m", "langmill", "data", "prepare", str(raw), "--out", str(out)),
        *("--json", "--quiet", *small, *more),
    ]


def made(out: Path) -> str:
    sums = hashlib.sha256()
    for file in sorted(file for file in out.rglob("*") if file.is_file()):
        sums.update(file.relative_to(out).as_posix().encode() + file.read_bytes())
    return sums.hexdigest()


def units_done(out: Path) -> int:
    return len(list(out.with_name(out.name + ".run").glob("units/*/unit.json")))


def workers() -> list[int]:
    """Processes of Ray on this machine that do a unit just now; none but this bench's cluster may run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::_task"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def disturbed(
    words: list[str], out: Path, after: int, do: Callable[[subprocess.Popen[bytes]], bool]
) -> dict[str, Any]:
    """Run, and once `after` units are done, `do` (again until it says that it did). What the command told."""
    running, hit = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE), False
    try:
        while running.poll() is None and not hit:
            hit = units_done(out) >= after and do(running)
            time.sleep(0.02)
        output, errors = running.communicate(timeout=200)
    finally:
        running.kill()
    lines = output.decode().splitlines()
    told = json.loads(lines[-1]) if lines else {}
    failed = [why for *_, why in told.get("failed", [])]
    return {"hit": hit, "units_done_then": after, "code": running.returncode, "failed": failed,
            "errors": errors.decode(errors="replace")[-600:] if running.returncode else ""}  # fmt: skip


def kill_worker(_: subprocess.Popen[bytes]) -> bool:
    for pid in workers()[:1]:
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=12)
    options = parser.parse_args()
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        sys.exit(str(MissingExtra("cluster", "ray")))
    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        write(place / "raw", options.megabytes)
        subprocess.run(command(place / "raw", place / "native"), check=True, stdout=subprocess.DEVNULL)
        wanted, total = made(place / "native"), units_done(place / "native")
        cluster = Cluster(initialize_head=True, head_node_args=node | {"node_ip_address": "127.0.0.2"})
        found: dict[str, Any] = {}
        try:
            second = cluster.add_node(**node, node_ip_address="127.0.0.3")
            ray = ("--engine", "ray", "--address", cluster.address)

            def kill_node(_: subprocess.Popen[bytes]) -> bool:
                cluster.remove_node(second, allow_graceful=False)
                return True

            def kill_command(running: subprocess.Popen[bytes]) -> bool:
                running.kill()
                return True

            for name, do in (("undisturbed", lambda _: True), ("worker killed", kill_worker),
                             ("command killed", kill_command), ("node killed", kill_node)):  # fmt: skip
                out = place / name.replace(" ", "_")
                words, start = command(place / "raw", out, *ray), time.perf_counter()
                found[name] = disturbed(words, out, total // 3, do)
                if found[name]["code"]:
                    again = disturbed(words, out, 0, lambda _: True)
                    found[name] |= {"again": again["code"], "again_errors": again["errors"]}
                print(name, found[name], file=sys.stderr, flush=True)
                same = out.is_dir() and made(out) == wanted
                found[name] |= {"same": same, "seconds": round(time.perf_counter() - start, 1)}
        finally:
            cluster.shutdown()
    print(json.dumps({"units": total, "runs": found}, indent=1))
    sys.exit(not all(run["same"] and run["hit"] for run in found.values()))


if __name__ == "__main__":
    main()
