"""What a save of adapters writes beside a large frozen base.

    python launch/studies/adapters.py                       # a base of 1 GiB in fp32
    python launch/studies/adapters.py --layers 1 --rank 2

LoRA adapters of PEFT in square layers of 4096, averaged with the default options and with the base in the files. The
bytes are what the process gives to `write`, as Linux counts them, and those of the files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

from torch import nn

from dist_ema import ConstantSchedule, ShardedEMA

_WIDTH = 4096


def adapted(layers: int, rank: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        base = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
        config = peft.LoraConfig(r=rank, target_modules=[str(number) for number in range(layers)])
        model: nn.Module = peft.get_peft_model(base, config)
    return model


def written_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of 64 MiB in fp32")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    arguments = parser.parse_args()
    model = adapted(arguments.layers, arguments.rank)
    adapter = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    print(f"adapters {adapter:,} bytes, base {whole - adapter:,} bytes\n")
    print("| files hold | written bytes | of the adapters' | bytes of the files | seconds |\n|---|---|---|---|---|")
    for held, averaged_only in (("the averaged tensors", None), ("everything", False)):
        with tempfile.TemporaryDirectory() as folder:
            ema = ShardedEMA(model, ConstantSchedule(decay=0.99), averaged_only=averaged_only)
            ema.update()
            before, began = written_bytes(), time.perf_counter()
            ema.save(Path(folder, "ema"))
            seconds, written = time.perf_counter() - began, written_bytes() - before
            files = sum(path.stat().st_size for path in Path(folder, "ema").iterdir())
            print(f"| {held} | {written:,} | {written / adapter:.3f} | {files:,} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
