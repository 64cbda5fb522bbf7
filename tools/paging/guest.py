"""Runs a command of this machine under another kernel, in QEMU: for cgroups of version 2 where ours has version 1.

    python tools/paging/guest.py --kernel FOLDER [--memory 3GiB] [--disk FILE ...] -- COMMAND ...

FOLDER is an unpacked kernel package of Debian's (apt-get download linux-image-6.1.0-NN-amd64; dpkg -x). The guest sees
this machine's files (9p), what it writes is kept in its memory, and each --disk FILE lies in /mnt/disk on a disk of its
own, so that O_DIRECT and a cold page cache are real. Control groups are at /sys/fs/cgroup. Needs qemu-system-x86,
busybox-static and e2fsprogs, and root, since the guest's root is this machine's. The processor is emulated: slow, so
take small models.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from capped import memory_size

MODULES = ("virtio_pci", "virtio_blk", "9p", "9pnet_virtio", "overlay", "ext4", "crc32c_generic")
STATUS = "guest: exit status"  # the line that tells it
INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
for module in $(cat /modules/order); do insmod /modules/$module; done
mkdir -p /host /kept /whole
mount -t proc proc /proc
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 host /host
mount -t tmpfs tmpfs /kept
mkdir /kept/upper /kept/work
mount -t overlay -o lowerdir=/host,upperdir=/kept/upper,workdir=/kept/work overlay /whole
mount -t devtmpfs devtmpfs /whole/dev
mkdir -p /whole/dev/shm /whole/mnt/disk
mount -t proc proc /whole/proc
mount -t sysfs sysfs /whole/sys
mount -t cgroup2 cgroup2 /whole/sys/fs/cgroup
mount -t tmpfs tmpfs /whole/tmp
mount -t tmpfs tmpfs /whole/dev/shm
[ ! -e /whole/dev/vda ] || mount -t ext4 /whole/dev/vda /whole/mnt/disk
cp /command /whole/tmp/command
chroot /whole /bin/sh /tmp/command
echo "@STATUS@ $?"
poweroff -f
"""


def needed_modules(kernel: Path) -> list[Path]:
    """The files of MODULES and of what they need, in the order to load them."""
    files = {path.name.removesuffix(".ko").replace("-", "_"): path for path in kernel.glob("lib/modules/*/**/*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:  # built in, or there already
            return
        found = re.search(rb"\0depends=([^\0]*)", path.read_bytes())
        for other in found[1].decode().split(",") if found else ():
            add(other)
        order.append(path)

    for name in MODULES:
        add(name)
    return order


def cpio(entries: Sequence[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """An archive of (name, mode, content) in the "newc" form that the kernel reads."""
    for name, mode, content in [*entries, ("TRAILER!!!", 0, b"")]:
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        yield head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def initial_files(kernel: Path, command: Sequence[str]) -> bytes:
    """The compressed archive of the guest's first files."""
    busybox = Path("/bin/busybox")
    applets = "sh cat mkdir mount insmod chroot cp poweroff".split()
    modules = needed_modules(kernel)
    script = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}\n"
    folder, program, link = 0o040755, 0o100755, 0o120777
    entries = [(name, folder, b"") for name in ("bin", "modules", "proc", "dev")]
    entries += [("bin/busybox", program, busybox.read_bytes())]
    entries += [(f"bin/{applet}", link, b"busybox") for applet in applets]
    entries += [(f"modules/{path.name}", program, path.read_bytes()) for path in modules]
    entries += [("modules/order", program, "\n".join(path.name for path in modules).encode())]
    entries += [("command", program, script.encode()), ("init", program, INIT.replace("@STATUS@", STATUS).encode())]
    return gzip.compress(b"".join(cpio(entries)), 1)


def disk_image(files: Sequence[Path], image: Path) -> None:
    """An ext4 file system that holds the files."""
    with tempfile.TemporaryDirectory(dir=image.parent) as folder:
        for file in files:
            os.symlink(file.resolve(), Path(folder) / file.name)
        copied = subprocess.run(["cp", "-rL", "--reflink=auto", folder, str(image) + ".files"])
        copied.check_returncode()
    size = sum(file.stat().st_size for file in files)
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", f"{image}.files", str(image), f"{size * 11 // 10 + (64 << 20) >> 10}k"],
        check=True,
    )
    subprocess.run(["rm", "-r", f"{image}.files"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", type=Path, required=True, metavar="FOLDER", help="an unpacked kernel package")
    parser.add_argument("--memory", type=memory_size, default=3 << 30, help="of the guest (default 3GiB)")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--disk", type=Path, nargs="+", default=[], metavar="FILE", help="files for /mnt/disk")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("no command")
    with tempfile.TemporaryDirectory() as folder:
        initrd, image = Path(folder) / "initrd", Path(folder) / "disk"
        initrd.write_bytes(initial_files(arguments.kernel, command))
        qemu = ["qemu-system-x86_64", "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"]
        qemu += ["-smp", str(arguments.cpus), "-m", f"{arguments.memory >> 20}M"]
        qemu += ["-cpu", "max"]
        qemu += ["-kernel", str(next(arguments.kernel.glob("boot/vmlinuz-*"))), "-initrd", str(initrd)]
        qemu += ["-append", "console=ttyS0 panic=-1 quiet mitigations=off"]
        qemu += ["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]
        if arguments.disk:
            disk_image(arguments.disk, image)
            qemu += ["-drive", f"file={image},format=raw,if=virtio,cache=none"]
        status = 1
        with subprocess.Popen(qemu, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as machine:
            assert machine.stdout is not None
            for line in machine.stdout:
                if line.startswith(STATUS):
                    status = int(line.split()[-1])
                else:
                    print(line, end="", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
