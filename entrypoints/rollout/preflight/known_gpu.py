"""What is known of each finding of the kind gpu; see ``known.py``."""

from __future__ import annotations

from rollout.preflight.finding import Known

GPU = {
    "gpu-driver-missing": Known(
        "no NVIDIA driver on this host; run it on a GPU host",
        "The kernel has no NVIDIA module: a login node, or a container engine without GPU support.",
    ),
    "gpu-not-in-container": Known(
        "no GPU in this container; start it with '--gpus all' (docker), '--device "
        "nvidia.com/gpu=all' (podman, CDI), '--nv' (Apptainer) or the limit 'nvidia.com/gpu: 1' "
        "(Kubernetes)",
        "The host has a driver, and the container was started without a device of it. On WSL2 "
        "the device is /dev/dxg.",
    ),
    "gpu-control-missing": Known(
        "/dev/nvidiactl is not in this container, though a GPU is: it was given by '--device' "
        "alone; start it with '--gpus all' (docker), '--device nvidia.com/gpu=all' (podman, CDI), "
        "'--nv' (Apptainer) or the limit 'nvidia.com/gpu: 1' (Kubernetes)",
        "The driver's own node was not passed on. Nothing can ask the driver then.",
    ),
    "gpu-uvm-missing": Known(
        "/dev/nvidia-uvm is not in this container, and CUDA does not start without it; run "
        "'nvidia-modprobe -u -c 0' on the host (with CDI then 'nvidia-ctk cdi generate "
        "--output=/etc/cdi/nvidia.yaml'), and start the container anew",
        "The module nvidia-uvm is loaded by the first process of root that uses CUDA. On a host "
        "that was just started there was none, and nvidia-smi works all the same.",
    ),
    "gpu-closed": Known(
        "/dev/nvidia0 is closed to user 1000: its mode is 0660, its group 44; start the container "
        "with '--group-add 44' (podman: '--group-add keep-groups'), or load the driver with "
        "NVreg_DeviceFileMode=0666",
        "The site opens GPUs to one group alone, and the container runs as a user without it.",
    ),
    "gpu-driver-too-old": Known(
        "driver 470.256.02 is older than CUDA 12.8 needs; update it to 525.60.13 or newer, or "
        "take an image of an older CUDA",
        "CUDA starts with drivers of its own major version and newer ones alone. What PTX the "
        "image's kernels hold, which may ask for a newer driver, is not looked at.",
    ),
    "gpu-driver-too-old-for-nvcc": Known(
        "driver 570.86.15 does not run what nvcc 13.0.88 of this image compiles (FlashInfer's "
        "kernels, for one); update it to 580.65.06 or newer, or take an image without them",
        "There is no nvcc 12 among the wheels, so images of CUDA 12 have nvcc 13. Its kernels end "
        "with 'unsupported toolchain'. Where nothing is compiled, the image works.",
        stops=False,
    ),
    "gpu-driver-shadowed": Known(
        "/usr/local/cuda/compat holds the libcuda.so.1 of driver 575.57.08, but the driver of "
        "this host is 570.86.15; take that folder out: set "
        "LD_LIBRARY_PATH=/opt/rollout/cuda/lib64",
        "A folder with another driver's library comes first. CUDA then refuses to start.",
    ),
    "gpu-driver-library-elsewhere": Known(
        "no libcuda.so.1 is found but in /usr/local/nvidia/lib64; set "
        "LD_LIBRARY_PATH=/opt/rollout/cuda/lib64:/usr/local/nvidia/lib64",
        "Device plugins of Kubernetes mount the driver where the loader does not look. The value "
        "keeps the image's own folder, which a variable of a pod would replace.",
    ),
    "gpu-driver-library-missing": Known(
        "the driver's libraries (libcuda.so.1) are not in this container; start it with "
        "'--gpus all' and NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "The devices were passed to the container by hand, the driver's libraries were not.",
    ),
    "gpu-driver-hangs": Known(
        "the driver does not answer within 10 s: it may wait for a GPU that is gone; see 'dmesg | "
        "grep -i xid' on the host",
        "A GPU fell off the bus, or is being reset. Engines hang as the question did.",
        stops=False,
    ),
    "gpu-nvml-missing": Known(
        "libnvidia-ml.so.1, by which the driver tells of its GPUs, is not in this container; "
        "start it with NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "The container was given CUDA's library alone. vLLM and the proof ask the other one.",
    ),
    "gpu-driver-mismatch": Known(
        "the driver's libraries in this container are of another version than the driver of the "
        "host (NVML code 18); start the container anew, and restart the host first if its driver "
        "was just updated",
        "The driver was updated while the container ran, or while its old module was in use.",
    ),
    "gpu-driver-silent": Known(
        "the driver does not answer in this container (NVML code 999): 'systemctl daemon-reload' "
        "on the host, for one, takes the GPUs from running containers; start the container anew, "
        "and by CDI ('--device nvidia.com/gpu=all'), which keeps them",
        "systemd wrote the container's device rules anew and did not know of the GPUs "
        "(nvidia-container-toolkit 1227). nvidia-smi on the host is healthy.",
    ),
    "gpu-all-hidden": Known(
        "CUDA_VISIBLE_DEVICES is '', which hides every GPU; unset it, or name one",
        "A scheduler or a script has set the variable to nothing, or to a name that is no GPU's.",
    ),
    "gpu-number-unknown": Known(
        "CUDA_VISIBLE_DEVICES names GPU 2, but this container has 2, counted from 0; name one of "
        "these: CUDA_VISIBLE_DEVICES=0",
        "A container counts its own GPUs from 0, whatever their numbers on the host.",
    ),
    "gpu-uuid-unknown": Known(
        "CUDA_VISIBLE_DEVICES names GPU-5d0f6f0b-2a52-0b51-94a1-4cf1b9d0a3f4, which is not in "
        "this container; unset it to have every GPU of the container, or name one by its number "
        "there, from 0",
        "The GPU was given to another container, or the name is another host's.",
    ),
    "gpu-named-twice": Known(
        "CUDA_VISIBLE_DEVICES is '0,0', which names 0 twice, and CUDA sees no GPU then; set "
        "CUDA_VISIBLE_DEVICES=0",
        "A script joined two lists. CUDA takes a list with a repetition for an empty one.",
    ),
    "gpus-cut-off": Known(
        "CUDA_VISIBLE_DEVICES is '0,7', and CUDA ends the list at '7', which is no GPU of this "
        "container; it sees 1: set CUDA_VISIBLE_DEVICES=0, or name GPUs of 'nvidia-smi' there",
        "CUDA ignores everything from the first unknown entry on, and says nothing.",
        stops=False,
    ),
    "gpu-named-by-uuid": Known(
        "CUDA_VISIBLE_DEVICES names GPU-5d0f6f0b-2a52-0b51-94a1-4cf1b9d0a3f4, and the vLLM of "
        "this image takes numbers alone; set CUDA_VISIBLE_DEVICES=1",
        "CUDA takes UUIDs, vLLM reads each as a number and ends (vllm 41848). The engine's own "
        "source is asked, so a release that takes them is not blamed.",
    ),
    "gpus-named-by-uuid": Known(
        "CUDA_VISIBLE_DEVICES names GPU-4279062b-846a-33ce-0869-868e6263c3a6,"
        "GPU-5d0f6f0b-2a52-0b51-94a1-4cf1b9d0a3f4, and SGLang divides a model among GPUs by "
        "number; set CUDA_VISIBLE_DEVICES=0,1",
        "SGLang takes UUIDs on one GPU, and reads numbers where several share a model.",
        stops=False,
    ),
    "gpu-lost": Known(
        "GPU 0 fell off the bus (NVML code 15); see 'dmesg | grep -i xid' on the host, reset it "
        "or restart the host, and take other GPUs until then",
        "The GPU does not answer the driver: a fault of the card, its power or its slot.",
    ),
    "gpu-fabric-not-ready": Known(
        "GPU 0 has not joined the NVLink fabric, and CUDA does not start before (error 802); "
        "start the fabric manager on the host, of the driver's own version: 'systemctl start "
        "nvidia-fabricmanager'",
        "On hosts with NVSwitch the fabric manager joins the GPUs. Without it nvidia-smi lists "
        "every GPU, and CUDA starts on none.",
    ),
    "gpu-fabric-failed": Known(
        "GPU 0 could not join the NVLink fabric (NVML code 999), so CUDA may not start, or GPUs "
        "do not reach one another; see the log of nvidia-fabricmanager on the host",
        "The fabric manager ran and could not join this GPU.",
        stops=False,
    ),
    "gpu-prohibited": Known(
        "GPU 0 is in compute mode PROHIBITED, in which nothing runs on it; 'nvidia-smi -i 0 -c "
        "DEFAULT' on the host ends that",
        "An administrator closed the GPU to computing.",
    ),
    "gpu-exclusive": Known(
        "GPU 0 is in an exclusive compute mode, and trainer and engine are two processes on one "
        "GPU; 'nvidia-smi -i 0 -c DEFAULT' on the host ends that",
        "The site gives a GPU to one process at a time. With a daemon of MPS it is no obstacle.",
    ),
    "gpu-mig-empty": Known(
        "GPU 0 is divided by MIG, and no instance of it is in this container; give it one: "
        "'--gpus device=0:0' (docker), 'nvidia.com/mig-1g.10gb: 1' or its like (Kubernetes), or "
        "end MIG on the host: 'nvidia-smi -i 0 -mig 0'",
        "A GPU in MIG mode computes by its instances alone, and there is none here.",
    ),
    "gpu-memory-bad": Known(
        "GPU 0 has bad memory that could not be taken out of use; take another GPU, and have this "
        "one replaced",
        "The card has no spare rows left for the memory that failed.",
        stops=False,
    ),
    "gpu-reset-pending": Known(
        "GPU 0 has bad memory that the next reset takes out of use; have it reset: 'nvidia-smi "
        "--gpu-reset -i 0' on the host, with nothing running on it",
        "The card found bad rows, and replaces them by spare ones when it is reset.",
        stops=False,
    ),
    "gpu-memory-errors": Known(
        "GPU 0 had 3 memory errors that were not corrected since its last reset, so numbers may "
        "be wrong; see 'nvidia-smi -i 0 -q -d ECC' and have it reset",
        "Two bits of a word were wrong. A training goes on with what was read.",
        stops=False,
    ),
    "gpu-ecc-changes": Known(
        "GPU 0 turns its ECC off with the next reset, and its memory changes with it; have it "
        "reset before a job counts on it: 'nvidia-smi --gpu-reset -i 0'",
        "An administrator switched ECC, which takes effect with the next reset.",
        stops=False,
    ),
    "gpu-memory-short": Known(
        "GPU 0 has 3.0 of 141.0 GiB free, 24 needed; stop the other process on it, or choose "
        "another GPU by CUDA_VISIBLE_DEVICES",
        "Another process holds the GPU's memory.",
    ),
    "gpu-too-small": Known(
        "GPU 0 has 22.0 GiB in all, too small for the proof, which needs 24 free; take a larger "
        "GPU for it: engines with a smaller model may run here",
        "The proof holds two sets of weights, two oracles and an engine on one GPU. No card of "
        "24 GB has that free, whatever runs on it.",
    ),
    "gpu-shared": Known(
        "GPU 0 has 100.0 of 141.0 GiB free: another process works on it, and the proof measures "
        "the memory of the whole GPU; choose another GPU by CUDA_VISIBLE_DEVICES if a check of "
        "memory fails",
        "What another process takes or gives back meanwhile counts as the engine's.",
        stops=False,
    ),
}
