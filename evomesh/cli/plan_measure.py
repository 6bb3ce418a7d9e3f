"""The part of ``evomesh plan`` that measures this machine and writes its device file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from evomesh.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from evomesh.plan.device import Device
    from evomesh.plan.measured_rates import MessageRate, OperatorRate

MEBI = 2**20
# Operators that are shown: those that take most of a step.
MOST_SHOWN = (
    "mm",
    "_linear_pointwise",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_fused_adamw_",
    "mul",
    "add_",
    "copy_",
    "silu",
    "exp_",
    "cat",
    "index_select",
)


def measure_machine(console: Console, path: Path, config: str | None) -> None:
    """Measure this machine, show what it can do, and write its device file.

    Raises:
        UserError: the file exists or is not named like a device file, a config is given, or a process failed.
    """
    _check(path, config)
    from evomesh.plan.device_file import write_device
    from evomesh.plan.measure import machine_name, measure_device

    started = time.monotonic()

    def say(what: str) -> None:
        passed = time.monotonic() - started
        console.print(f"{passed:4.0f} s: measuring {what}", highlight=False)

    name = machine_name()
    device = measure_device(name, say)
    passed = time.monotonic() - started
    day = time.strftime("%Y-%m-%d")
    comment = f"Measured by evomesh plan --measure on {day}."
    write_device(device, path, comment)
    for table in (operator_table(device), message_table(device)):
        console.print(table)
    lines = describe(device)
    lines.append(f"wrote {path} after {passed:.0f} s")
    for line in lines:
        console.print(line, highlight=False)


def _check(path: Path, config: str | None) -> None:
    if config is not None:
        raise UserError(
            f"{config} and a measurement",
            where="--measure",
            expected="no config: measure first, then predict",
            fix=f"evomesh plan --measure {path}, then evomesh plan {config} --gpus N --device {path}",
            code="EVO-CLI-004",
        )
    if path.suffix != ".toml":
        raise UserError(
            f"{path} is no name of a device file",
            where="--measure",
            expected="a name that ends in .toml",
            code="EVO-CLI-002",
        )
    if path.exists():
        raise UserError(
            f"{path} exists",
            where="--measure",
            expected="a new file",
            code="EVO-CLI-005",
        )
    if not path.absolute().parent.is_dir():
        raise UserError(
            f"{path}: its folder does not exist",
            where="--measure",
            expected="a file in a folder that exists",
            code="EVO-CLI-005",
        )


def operator_table(device: Device) -> Table:
    """Return the rates of the operators that take most of a step."""
    from rich.table import Table

    table = Table(
        "operator",
        "dtype",
        "size",
        title="operators, 10^9 operations or bytes a second",
    )
    for column in ("smallest work", "rate", "largest work", "rate"):
        table.add_column(column, justify="right")
    for curve in device.operators:
        if curve.name in MOST_SHOWN and curve.dtype in ("float32", "bfloat16"):
            table.add_row(*_operator_cells(curve))
    return table


def _operator_cells(curve: OperatorRate) -> list[str]:
    return [
        curve.name.removeprefix("_scaled_dot_product_"),
        curve.dtype,
        str(curve.size or ""),
        f"{curve.work[0]:.2g}",
        f"{curve.rate[0]:.3g}",
        f"{curve.work[-1]:.2g}",
        f"{curve.rate[-1]:.3g}",
    ]


def message_table(device: Device) -> Table:
    """Return the latency and the rates of each kind of message."""
    from rich.table import Table

    table = Table("message", title="messages, each rank sending")
    columns = ("ranks", "of processes", "latency, us", "64 KiB, GB/s", "8 MiB, GB/s")
    for column in columns:
        table.add_column(column, justify="right")
    for rate in device.messages:
        table.add_row(*_message_cells(rate))
    return table


def _message_cells(rate: MessageRate) -> list[str]:
    cells = [
        rate.operation,
        str(rate.ranks),
        str(rate.processes),
        f"{rate.latency:.0f}",
    ]
    for nbytes in (MEBI // 16, 8 * MEBI):
        seconds = rate.message_seconds(nbytes)
        cells.append(f"{nbytes / seconds / 1e9:.2f}")
    return cells


def describe(device: Device) -> list[str]:
    """Return what the tables do not show."""
    rates = device.rates
    lines = [
        f"best products: {rates.float32 * 1e3:.0f} GFLOP/s in float32, {rates.bfloat16 * 1e3:.0f} in bfloat16; "
        f"memory {rates.memory:.1f} GB/s",
    ]
    host = device.host
    if host is not None:
        lines.append(
            f"{host.cores} cores, on which more ranks take turns; {host.launch:.1f} us between two operators"
        )
    return lines
