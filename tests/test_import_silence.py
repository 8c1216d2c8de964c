"""Importing a module of the package does nothing: no hook, no handler, no thread, and no look at the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dist_ema

# Run in a fresh process: imports every module of the packages that the arguments name.
SPY = """
import _thread, atexit, importlib, os, pkgutil, signal, sys, threading, weakref
import torch, torch.distributed, torch.optim  # what they do at their own import is theirs

packages, told = sys.argv[1:], []


def belongs_to_package(frame):
    # Up to the next import statement: what the package imports from elsewhere is not its own deed.
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("importlib"):
        if frame.f_globals.get("__name__", "").split(".")[0] in packages:
            return frame.f_globals["__name__"]
        frame = frame.f_back
    return None


def spy(owner, name):
    genuine = getattr(owner, name)

    def tell(frame):
        module = belongs_to_package(frame)
        if module is not None:
            told.append(f"{module} calls {name}")

    def spied(*args, **kwargs):
        tell(sys._getframe(1))
        return genuine(*args, **kwargs)

    def made(self, *args, **kwargs):
        tell(sys._getframe(1))
        genuine.__init__(self, *args, **kwargs)

    # A class stays one: other libraries name it in annotations.
    setattr(owner, name, type(name, (genuine,), {"__init__": made}) if isinstance(genuine, type) else spied)


spy(os, "register_at_fork")
spy(atexit, "register")
spy(os._Environ, "__getitem__")
spy(os._Environ, "__iter__")
spy(signal, "signal")
spy(threading.Thread, "start")
spy(_thread, "start_new_thread")
spy(weakref, "finalize")
spy(sys.modules["torch.optim.optimizer"], "register_optimizer_step_pre_hook")
spy(sys.modules["torch.optim.optimizer"], "register_optimizer_step_post_hook")

number = 0
for package in packages:
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(root.__path__, package + "."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
            number += 1
        except ModuleNotFoundError as error:
            if (found.name, error.name) != ("dist_ema.averaging.fused.kernel", "triton"):
                raise
print(number)
print("\\n".join(told))
"""


CARELESS = {
    "forks": ("import os; os.register_at_fork(after_in_child=len)", "register_at_fork"),
    "exits": ("import atexit; atexit.register(len, ())", "register"),
    "gets": ("import os; os.environ.get('PATH')", "__getitem__"),
    "gets_otherwise": ("import os; os.getenv('PATH')", "__getitem__"),
    "asks": ("import os; 'PATH' in os.environ", "__getitem__"),
    "copies": ("import os; dict(os.environ)", "__iter__"),
    "handles": ("import signal; signal.signal(signal.SIGUSR1, signal.SIG_DFL)", "signal"),
    "starts": ("import threading; threading.Thread(target=len, args=((),)).start()", "start"),
    "finalizes": ("import weakref; weakref.finalize(weakref.WeakSet(), len, ())", "finalize"),
    "hooks": (
        "from torch.optim.optimizer import register_optimizer_step_pre_hook as hook; hook(len)",
        "register_optimizer_step_pre_hook",
    ),
}


def test_importing_every_module_reads_no_environment_and_registers_nothing(tmp_path) -> None:
    (tmp_path / "careless").mkdir()
    (tmp_path / "careless" / "__init__.py").touch()
    for name, (line, _) in CARELESS.items():
        (tmp_path / "careless" / f"{name}.py").write_text(line + "\n")
    beside = [str(tmp_path), str(Path(dist_ema.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [sys.executable, "-c", SPY, "dist_ema", "careless"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(beside)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    number, *told = ran.stdout.splitlines()
    assert int(number) > 60 + len(CARELESS)
    assert [line for line in told if line.startswith("dist_ema")] == []
    assert {f"careless.{name} calls {called}" for name, (_, called) in CARELESS.items()} <= set(told)  # the spies see


FORKS = """
import os, signal, sys, threading
import torch
from dist_ema.averaging.cpu_threads import share_out
from dist_ema.averaging.streams import HostThread

torch.set_num_threads(3)
beside = HostThread(torch.device("cpu"))
done = []


def work():
    signal.alarm(40)  # a child that waits for threads of its parent waits for ever
    # Three batches that meet: each has a thread of its own.
    met = threading.Barrier(3)
    share_out(lambda batch, worker: done.append((batch, met.wait())), [0, 1, 2], 3)
    beside.run(lambda: done.append("beside"))
    beside.join()
    assert len(done) == 4, done
    done.clear()


work()
child = os.fork()
work()
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_hooks_that_are_registered_at_first_use_serve_a_forked_process() -> None:
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
