#!/bin/sh
# A Ray node in docker, on the host's network:
#
#   ray.sh head            on one machine; prints what to run on the others and what to do then
#   ray.sh join HEAD       on each of the others; HEAD is the name or the address of the first
#   ray.sh stop            on each of them, at the end
#
# The first four lines below are yours.
set -eu
image=${IMAGE:-verl-rollout:vllm-0.12}
shared=${SHARED:-/shared}                # data and models; every machine sees it under this name
cache=${CACHE:-/var/tmp/rollout-$(id -u)} # on a disk of this machine
port=${PORT:-6379}

start() { # ARGUMENTS of `ray start`
    mkdir -p "$cache"
    # Programs are loaded from there: somebody else may have made a folder of that name.
    [ "$(stat -L -c %u "$cache")" = "$(id -u)" ] || { echo "$cache is not yours; say CACHE=" >&2; exit 3; }
    set -- "$image" ray start "$@" --disable-usage-stats --block
    # InfiniBand and RoCE: the devices, and memory that may be locked for them.
    [ ! -e /dev/infiniband ] || set -- --device /dev/infiniband --ulimit memlock=-1 "$@"
    docker run --detach --name ray --gpus all --shm-size 10g --network host \
        --ulimit nofile=65536 --user "$(id -u):0" \
        --volume "$cache:/var/cache/rollout" --volume "$shared:$shared" "$@"
}

case ${1-} in
    head)
        start --head --port "$port"
        echo "on the others: ray.sh join $(hostname -f)"
        echo "then, here:    docker exec ray rollout fleet --nodes N --report /tmp/fleet.json"
        ;;
    join) start --address "${2:?the name or the address of the head is missing}:$port" ;;
    stop) docker rm --force ray ;;
    *)
        echo "ray.sh: say head, join HEAD or stop" >&2
        exit 2
        ;;
esac
