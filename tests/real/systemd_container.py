"""A container with systemd as its first process and this system's files as its root, to install a package and run its
service.

Everything it writes goes to memory and is lost afterwards. It has its own network, processes, control groups and devices;
kernel settings are read-only.
"""

import subprocess
from pathlib import Path

from fixtures import TIMEOUT, Folder, Process, program, wait_for

# Boot script. $1 is the folder of the container, $2 the package.
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
# Only the journal and the installed package start automatically.
rm -rf "$root"/lib/systemd/system/*.wants "$root"/etc/systemd/system/*.wants
mkdir "$root/lib/systemd/system/sysinit.target.wants"
ln -s ../systemd-journald.service "$root/lib/systemd/system/sysinit.target.wants"
: > "$root/etc/fstab"
rm -f "$root/usr/sbin/policy-rc.d"
cp "$2" "$root/root/package.deb"
# As in a normal boot: systemd mounts the credentials of a service outside of its mount namespace.
mount --make-rshared "$root"
export container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec chroot "$root" /lib/systemd/systemd --unit=multi-user.target
"""


class SystemdContainer:
    """Boots when it is created; `run` runs a command inside."""

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
        # Enter the control group before creating the namespace, so that it is the root of the control groups of systemd.
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
        assert self.process.child.poll() is None, f"the container ended:\n{self.process.text()}"
        children = Path(f"/proc/{self.process.child.pid}/task/{self.process.child.pid}/children").read_text().split()
        return children and int(children[0])

    def _running(self):
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def run(self, *command, check=True):
        """Runs a command inside and returns its standard output and error."""
        done = subprocess.run(self.inside(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=2 * TIMEOUT)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{self.process.text()}"
        return done.stdout

    def inside(self, *command):
        """The command line that runs `command` inside."""
        spaces = ["--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--root", "--wd"]
        environment = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root"]
        return [program("nsenter"), "--target", str(self.first), *spaces, *environment, *map(str, command)]

    def write(self, path, text):
        """Writes a file inside, with `tee`, because its folders are visible only there."""
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
            # Children first.
            for path in sorted(self.group.glob("**/"), key=lambda path: len(path.parts), reverse=True):
                path.rmdir()
        except OSError:
            return False
        return True
