"""A machine of its own: systemd as first process over this system's files, where a package is really installed and its
service really runs.

Everything it writes goes to memory and is gone afterwards. Network, processes, control groups and devices are its own;
the kernel's settings are read-only for it.
"""

import subprocess
from pathlib import Path

from fixtures import TIMEOUT, Folder, Process, program, wait_for

# What the script is told: $1 the folder for all this, $2 the package.
BOOT = r"""
set -e
root=$1/root
mount -t tmpfs -o mode=755 tmpfs "$1/memory"
mkdir "$1/memory/upper" "$1/memory/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/memory/upper,workdir=$1/memory/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
# Nothing starts by itself but the journal and what the test installs.
rm -rf "$root"/lib/systemd/system/*.wants "$root"/etc/systemd/system/*.wants
mkdir "$root/lib/systemd/system/sysinit.target.wants"
ln -s ../systemd-journald.service "$root/lib/systemd/system/sysinit.target.wants"
: > "$root/etc/fstab"
rm -f "$root/usr/sbin/policy-rc.d"
cp "$2" "$root/root/package.deb"
# As every systemd has it: credentials are mounted beside a service and must arrive there.
mount --make-rshared "$root"
export container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec chroot "$root" /lib/systemd/systemd --unit=multi-user.target
"""


class SystemdContainer:
    """Boots at once; `run` runs a command inside."""

    def __init__(self, package):
        self.folder = Folder()
        self.root = self.folder.path / "root"
        self.groups = self.folder.path / "groups"
        for path in (self.root, self.groups, self.folder.path / "memory"):
            path.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", self.groups], check=True)
        self.group = self.groups / self.folder.path.name
        self.group.mkdir()
        script = self.folder.write("boot", BOOT)
        # The control group is entered first, so that it is the root of those that systemd sees.
        enter = f'echo $$ > {self.group}/cgroup.procs; exec "$@"'
        own = [program("unshare"), "--cgroup", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
        self.process = Process(["sh", "-ec", enter, "enter", *own, "sh", script, self.folder.path, package],
                               self.folder.path / "console")
        try:
            self.first = wait_for("the first process", self._first)
            wait_for("systemd", self._running)
        except BaseException:
            self.close()
            raise

    def _first(self):
        assert self.process.child.poll() is None, f"the machine ended:\n{self.process.text()}"
        children = Path(f"/proc/{self.process.child.pid}/task/{self.process.child.pid}/children").read_text().split()
        return children and int(children[0])

    def _running(self):
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def run(self, *command, check=True):
        """What a command inside says, errors too."""
        done = subprocess.run(self.inside(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=2 * TIMEOUT)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{self.process.text()}"
        return done.stdout

    def inside(self, *command):
        """The command line that runs a command inside."""
        spaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--root", "--wd"]
        environment = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root"]
        return [program("nsenter"), "--target", str(self.first), *spaces, *environment, *map(str, command)]

    def write(self, path, text):
        """A file inside; `tee` because its folders are visible only there."""
        subprocess.run(self.inside("tee", path), input=text, stdout=subprocess.DEVNULL, text=True, check=True, timeout=TIMEOUT)

    def journal(self):
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit=vestibule")

    def close(self):
        self.process.kill()
        wait_for("the control groups to empty", self._remove_groups)
        subprocess.run(["umount", self.groups], check=True)
        self.folder.remove()

    def _remove_groups(self):
        try:
            # Those below first.
            for path in sorted(self.group.glob("**/"), key=lambda path: len(path.parts), reverse=True):
                path.rmdir()
        except OSError:
            return False
        return True
