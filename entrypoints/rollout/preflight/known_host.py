"""What is known of each finding of the kinds memory, cache and temporary; see ``known.py``."""

# ruff: noqa: S108 - mount points in sentences, no files in them

from __future__ import annotations

from rollout.preflight.finding import Known

MEMORY = {
    "shm-missing": Known(
        "/dev/shm does not exist; start the container with '--shm-size 1g'",
        "The container was started without a shared memory. Weights are passed through it.",
    ),
    "shm-not-writable": Known(
        "/dev/shm cannot be written; start the container with '--shm-size 1g'",
        "The host's /dev/shm was mounted with modes for root alone, or read-only.",
    ),
    "shm-full": Known(
        "/dev/shm has 15 MiB free; start the container with '--shm-size 1g'",
        "Container engines give 64 MiB, and a job that died leaves its segments there.",
    ),
    "shm-for-one-gpu": Known(
        "/dev/shm has 64 MiB, which is enough for one GPU; tensor parallelism (NCCL, vLLM's "
        "queues) needs '--shm-size 10g' or '--ipc host'",
        "Container engines give 64 MiB. NCCL and the engines' queues take more for each GPU.",
        stops=False,
    ),
    "memory-limited": Known(
        "1.0 GiB of memory free, 3 needed: /sys/fs/cgroup/job/step allows 8.0 GiB; raise the limit "
        "(docker --memory, Slurm --mem, Kubernetes resources.limits.memory)",
        "A control group, of this container or one around it, allows less than the proof takes: "
        "the kernel kills it then. Files that were read and can be dropped do not count as used. "
        "A GPU's proof needs 8 GiB, which is derived and was not measured.",
    ),
    "memory-short": Known(
        "1.5 GiB of memory free, 3 needed; free some, or raise the container's limit (--memory)",
        "Other processes leave less than the proof takes, or the machine is too small.",
    ),
    "files-limited": Known(
        "a process may open 4096 files, and engines ask for 65535; start the container with "
        "'--ulimit nofile=65535:65535', or raise the hard limit of the user (limits.conf)",
        "Each request and each process of Ray takes some. vLLM and SGLang raise the soft limit to "
        "65535 themselves, where the hard one lets them.",
        stops=False,
    ),
    "processes-limited": Known(
        "this user may have 4096 processes and threads, and Ray with an engine takes thousands; "
        "run 'ulimit -u 16384' before the job, or start the container with '--ulimit nproc=16384'",
        "Threads count, of all processes of the user on the host. Ray starts a worker for each "
        "core, and each has dozens (verl issue 719).",
        stops=False,
    ),
    "pids-limited": Known(
        "/sys/fs/cgroup/job allows 2048 processes and threads, of which 2000 are left, and Ray "
        "with an engine takes thousands; start the container with '--pids-limit -1', or raise the "
        "kubelet's podPidsLimit",
        "Podman allows 2048 unless told otherwise, and Kubernetes what the node says.",
        stops=False,
    ),
    "locked-memory-limited": Known(
        "there is a fast network (/dev/infiniband), and a process may lock 8192 KiB of memory, "
        "which NCCL exceeds when it registers buffers; start the container with '--ulimit "
        "memlock=-1'",
        "What an adapter of InfiniBand, RoCE or EFA reads and writes is locked in memory. NCCL "
        "falls to sockets or ends where it may not.",
        stops=False,
    ),
}

CACHE = {
    "cache-read-only": Known(
        "/var/cache/rollout is mounted read-only; give a writable folder: mount one at "
        "/var/cache/rollout",
        "The container has a read-only root, or the folder was mounted so. Engines compile at "
        "their start and write there.",
    ),
    "cache-not-writable": Known(
        "/var/cache/rollout cannot be written; mount a writable folder there, or run with group 0",
        "The folder belongs to another user, and the container runs without group 0.",
    ),
    "cache-noexec": Known(
        "/var/cache/rollout is mounted noexec, and compiled kernels cannot be loaded from there; "
        "mount it with exec (docker: '--tmpfs …:exec')",
        "Docker mounts a tmpfs noexec, and so do many sites their scratch disks.",
    ),
    "cache-unreadable": Known(
        "/var/cache/rollout/triton/a (user 1000, mode 700) and 1 more cannot be read by this user; "
        "let their owner run 'chmod -R g+rwX /var/cache/rollout', or give this user a cache of "
        "its own",
        "Another user compiled them with a umask that closes them. An engine that finds the same "
        "kernel's name ends with PermissionError. The first 2000 files are looked at.",
    ),
    "cache-full": Known(
        "the disk of /var/cache/rollout has room for 63 MiB; free some, or mount one at "
        "/var/cache/rollout on another",
        "Nothing can be compiled any more. A quota is not seen.",
    ),
    "cache-of-another-user": Known(
        "/var/cache/rollout/triton/a (user 1000, mode 755) and 1 more cannot be written by this "
        "user, who cannot replace what is compiled there; let their owner run "
        "'chmod -R g+rwX /var/cache/rollout', or give this user a cache of its own",
        "Another user compiled them with a umask of 022. They are loaded. What has to be compiled "
        "anew into such a folder fails, and so does opening a lock or a log.",
        stops=False,
    ),
    "cache-nearly-full": Known(
        "the disk of /var/cache/rollout has room for 1024 MiB, and engines compile and download "
        "more; free some, or mount one at /var/cache/rollout on another",
        "2 GiB are asked for: a guess, since the size of compiled kernels was not measured.",
        stops=False,
    ),
    "cache-on-nfs": Known(
        "/var/cache/rollout lies on NFS (home:/export), where locks hold on one node alone and "
        "files vanish under another (ESTALE); take a folder on a local disk: mount one at "
        "/var/cache/rollout",
        "All nodes of a job compile the same kernel at once, and one loses its file (SGLang issue "
        "31347).",
        stops=False,
    ),
    "cache-on-cluster-disk": Known(
        "/var/cache/rollout lies on Lustre (mds@o2ib:/scratch), where all nodes write the same "
        "small files and wait for each other; take a folder on a local disk: mount one at "
        "/var/cache/rollout",
        "Lustre, GPFS, BeeGFS and their like are made for few and large files.",
        stops=False,
    ),
    "cache-on-cifs": Known(
        "/var/cache/rollout lies on CIFS (//server/share), which keeps no modes and no links of "
        "compiled files; take a folder on a local disk: mount one at /var/cache/rollout",
        "A share of Windows or a NAS: what compilers set on a file is lost.",
        stops=False,
    ),
    "cache-on-fuse": Known(
        "/var/cache/rollout lies on fuse.s3fs (bucket), where files may be slow and cannot be "
        "locked; take a folder on a local disk: mount one at /var/cache/rollout",
        "Object stores and sshfs through FUSE. What container engines lay their root on is not "
        "meant: fuse-overlayfs, squashfuse.",
        stops=False,
    ),
    "cache-cannot-grow": Known(
        "/data/hf (HF_HOME) cannot be written, and nothing new is kept there; set HF_HOME to a "
        "writable folder, or HF_HUB_OFFLINE=1 where all is there",
        "A folder of models that is mounted read-only: a download into it fails.",
        stops=False,
    ),
}

TEMPORARY = {
    "tmpdir-full": Known(
        "the disk of /tmp has room for 1024 MiB of temporary files, 2048 needed; free some, or set "
        "TMPDIR to a folder on another",
        "The proof on a GPU writes its model there. Compilers write there before any other "
        "command, and 64 MiB are asked for.",
    ),
    "tmpdir-too-long": Known(
        "TMPDIR is /lustre/scratch/users/somebody/projects/rollout/experiments/2026-11/job-4711, "
        "too long for the engine's sockets (70 bytes at most); set TMPDIR=/tmp",
        "The kernel takes 107 bytes for a socket's path, and the engine puts a name behind it.",
    ),
    "tmpdir-too-long-for-ray": Known(
        "TMPDIR is /lustre/scratch/users/somebody/jobs/4711, too long for Ray's sockets (35 bytes "
        "at most); set RAY_TMPDIR=/tmp",
        "Ray puts 72 bytes behind it, and the kernel takes 107 for a socket's path.",
        stops=False,
    ),
    "tmpdir-not-writable": Known(
        "TMPDIR is /scratch/4711, which is not there or cannot be written, so /tmp is taken; mount "
        "it into the container, or set TMPDIR=/tmp",
        "A scheduler sets TMPDIR to a folder of the host that the container does not have.",
        stops=False,
    ),
}
