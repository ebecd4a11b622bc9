"""What is known of each finding of the kinds variables and network; see ``known.py``."""

from __future__ import annotations

from rollout.preflight.finding import Known

VARIABLES = {
    "allocator-excludes-sleep": Known(
        "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True, which excludes sleep mode; unset it",
        "vLLM and SGLang allocate by another way where an engine can sleep, and assert on this.",
    ),
    "engine-port-is-address": Known(
        "VLLM_PORT is tcp://10.0.0.7:8000: Kubernetes sets it for a Service of that name, and "
        "vLLM does not start with it; set 'enableServiceLinks: false' in the pod's spec, or run "
        "'env -u VLLM_PORT …'",
        "A Service that is named vllm gives every pod of its namespace a variable VLLM_PORT.",
    ),
    "port-is-address": Known(
        "MASTER_PORT is tcp://10.0.0.7:29500: Kubernetes sets it for a Service of that name, and "
        "who reads it expects a number; set 'enableServiceLinks: false' in the pod's spec, or run "
        "'env -u MASTER_PORT …'",
        "Services named sglang, ray or master set it likewise.",
        stops=False,
    ),
    "gloo-interface-missing": Known(
        "GLOO_SOCKET_IFNAME is ib0, and there is no interface ib0 in this container, so no engine "
        "starts; name one of eth0, lo, or start the container with the host's network",
        "The host's interface is not the container's. Engines make a group of Gloo on one GPU, "
        "too, and end with 'Unable to find address for: ib0'.",
    ),
    "library-path-replaced": Known(
        "LD_LIBRARY_PATH lacks /opt/rollout/cuda/lib64, so sleeping may free nothing and compiled "
        "kernels may not load; set "
        "LD_LIBRARY_PATH=/opt/rollout/cuda/lib64:/usr/local/nvidia/lib64",
        "A variable of a pod or a job replaces the image's. SGLang's memory saver is preloaded "
        "and finds CUDA's runtime by this folder alone; so do kernels that FlashInfer compiles.",
        stops=False,
    ),
    "libraries-replaced": Known(
        "LD_LIBRARY_PATH has /usr/local/cuda/lib64, which holds libcublas.so.12: processes may "
        "load it in place of the locked one; set LD_LIBRARY_PATH=/opt/rollout/cuda/lib64",
        "A module of the site's puts its own CUDA in front of the one that was proved.",
        stops=False,
    ),
    "cuda-home-replaced": Known(
        "CUDA_HOME is /usr/local/cuda, and kernels are compiled with the image's own nvcc; set "
        "CUDA_HOME=/opt/rollout/cuda",
        "The site's CUDA is another release, or not in the container.",
        stops=False,
    ),
    "nccl-way-off": Known(
        "NCCL_P2P_DISABLE is 1, so NCCL sends weights and results of GPUs not by NVLink and PCIe "
        "but a slower way; unset it, or leave it where that way is broken",
        "Set once against a fault of another host, and kept in a profile.",
        stops=False,
    ),
    "nccl-cumem-on": Known(
        "NCCL_CUMEM_ENABLE is 1, and buffers of this kind survive no sleep; set "
        "NCCL_CUMEM_ENABLE=0, as the image does",
        "A job's value stands above the image's.",
        stops=False,
    ),
    "nccl-interface-missing": Known(
        "NCCL_SOCKET_IFNAME is ib0, which leaves none of this container's interfaces (eth0, lo), "
        "so NCCL does not start; name one of these, or start the container with the host's "
        "network",
        "The host's interface is not the container's.",
        stops=False,
    ),
    "launches-block": Known(
        "CUDA_LAUNCH_BLOCKING is set: every kernel is waited for, which is for finding errors and "
        "not for work; unset it",
        "Left from a search for an error.",
        stops=False,
    ),
    "mps-not-there": Known(
        "CUDA_MPS_PIPE_DIRECTORY is /tmp/nvidia-mps, where no daemon of MPS listens, so processes "
        "run without MPS; mount that folder of the host, or unset the variable",
        "The daemon runs on the host, and its folder is not in the container.",
        stops=False,
    ),
    "path-replaced": Known(
        "PATH lacks /opt/rollout/bin, so python3 is not the image's; set "
        "PATH=/opt/rollout/bin:/usr/bin:/bin",
        "A variable of a pod or a job replaces the image's.",
        stops=False,
    ),
    "python-home-replaced": Known(
        "PYTHONHOME is /opt/conda: Python takes its standard library from there, which is not the "
        "image's, or does not start; unset it",
        "An environment of the host's is active, and Apptainer or pyxis passes its variables on.",
        stops=False,
    ),
    "python-path-hides": Known(
        "PYTHONPATH: /home/me/site-packages holds torch, which the lock has too: Python takes it "
        "from there, and what was proved is not what runs; take the folder out of PYTHONPATH",
        "An environment of the host's is active. `rollout verify` and `rollout smoke` run without "
        "these variables, and a job with them.",
        stops=False,
    ),
    "compiler-missing": Known(
        "CC is /opt/cray/bin/cc, which is not in this container, and engines compile with it; run "
        "'env -u CC …'",
        "A module of the host's set it, and Apptainer and pyxis pass it on. Triton compiles with "
        "CC while an engine starts.",
        stops=False,
    ),
    "preload-missing": Known(
        "LD_PRELOAD names /opt/xalt/lib64/libxalt_init.so, which is not in this container, and "
        "every process complains of it; mount it, or unset LD_PRELOAD",
        "A tool of the site's that watches jobs, passed on by Apptainer or pyxis.",
        stops=False,
    ),
    "proxy-takes-local": Known(
        "http_proxy is set, and no_proxy lacks localhost and 127.0.0.1, so calls of an engine's "
        "own server go to the proxy; set no_proxy=localhost,127.0.0.1 and NO_PROXY to the same",
        "Engines, trainers and probes call the server by HTTP on the same host.",
        stops=False,
    ),
    "not-utf8": Known(
        "SITE_NAME holds bytes that are no UTF-8 (M\\xfcnchen), and who sends the variables on as "
        "text ends with UnicodeEncodeError; unset it, or write it in UTF-8",
        "A script in another encoding set it. Ray sends a job's variables on as text.",
        stops=False,
    ),
}

NETWORK = {
    "vocabulary-missing": Known(
        "TIKTOKEN_ENCODINGS_BASE is /data/encodings, where o200k_base.tiktoken is not to be "
        "found, so gpt-oss does not start; put that file there, or unset the variable where there "
        "is a network",
        "gpt-oss reads its vocabulary from there, and fetches it where the variable is not set.",
        stops=False,
    ),
    "interface-not-chosen": Known(
        "the job runs on 2 nodes, and each chooses among eth0, ib0 by itself; set "
        "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the one that leads to the other nodes",
        "Gloo takes what the host's name resolves to, NCCL the first that fits. Where nodes "
        "choose differently, the job waits until a timeout (aws-do-eks 50).",
        stops=False,
    ),
    "fast-network-not-in-container": Known(
        "the host has InfiniBand or RoCE (mlx5_0), and /dev/infiniband is not in this container, "
        "so NCCL between nodes goes over TCP; start it with '--device /dev/infiniband --cap-add "
        "IPC_LOCK --ulimit memlock=-1' (docker), or with the network's resource in the pod's "
        "limits (Kubernetes)",
        "NCCL says nothing and takes the slow way. It is said where the job has several nodes, "
        "and by `rollout doctor`.",
        stops=False,
    ),
    "fast-network-off": Known(
        "NCCL_IB_DISABLE is 1, so NCCL between nodes goes over TCP and not over mlx5_0; unset it",
        "Set once against a fault of another host, and kept in a profile.",
        stops=False,
    ),
    "efa-without-plugin": Known(
        "the host has EFA (rdmap0s31), and NCCL's plugin for it (aws-ofi-nccl) and libfabric "
        "(libfabric.so.1) are not found, so NCCL between nodes goes over TCP; mount /opt/amazon "
        "of the host and set LD_LIBRARY_PATH=/opt/rollout/cuda/lib64:/opt/amazon/ofi-nccl/lib:"
        "/opt/amazon/efa/lib",
        "NCCL does not know EFA by itself, and the image has no plugin for it.",
        stops=False,
    ),
}
