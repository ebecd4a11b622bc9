# An engine's own release image, with what else the lock has beside its packages, which stay as they are.
# `nox -s build -- REF --from REGISTRY` builds it, and with `--show` prints it as it is rendered for an image.
#
#   release image ── additions ── entrypoints
#
# The catalog names it by its digest, which decides what is genuine: any registry that has it will do.
ARG REGISTRY
FROM ${REGISTRY}/${RELEASE}
USER 0:0

# The argument is the sha256 of what could be added and how, as in images/recipes/Dockerfile.
ARG ADDITIONS
RUN --mount=type=bind,target=/mnt/context --mount=type=bind,from=fetched,target=/mnt/cache,rw \
    sh /mnt/context/additions

# The checkout's own files.
ARG ENTRYPOINTS
RUN --mount=type=bind,target=/mnt/context sh /mnt/context/entrypoints

# Its own programs stay on the path: MPI's are among them.
ENV PATH=/opt/rollout/bin:/var/cache/rollout/added/bin:/opt/added/bin:${PATH}

# Rendered: what images/recipes/base.Dockerfile sets.
