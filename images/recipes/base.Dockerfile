# The base of every image: Debian 12 packages (lockfiles/base.lock), a user, and one cache root, all of
# them in the tar that images/locking/rootfs.py makes. The context is that tar and this file, nothing else.
FROM scratch
ADD base.tar /

# Every cache below one folder, which can be mounted. HOME stands there too: without it libraries write
# to /, which fails for any user but root.
ENV PATH=/opt/rollout/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    HOME=/var/cache/rollout \
    XDG_CACHE_HOME=/var/cache/rollout \
    HF_HOME=/var/cache/rollout/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/rollout/inductor \
    TORCH_EXTENSIONS_DIR=/var/cache/rollout/torch-extensions \
    TRITON_CACHE_DIR=/var/cache/rollout/triton \
    CUDA_CACHE_PATH=/var/cache/rollout/cuda \
    VLLM_CACHE_ROOT=/var/cache/rollout/vllm \
    FLASHINFER_WORKSPACE_BASE=/var/cache/rollout/flashinfer

WORKDIR /var/cache/rollout
USER 1000:0
ENTRYPOINT ["rollout"]
CMD ["info"]
