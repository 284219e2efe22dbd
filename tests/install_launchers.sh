#!/bin/sh
# What tests/test_launch_hosts.py starts, from Debian's packages and without starting any service; what cannot be had is skipped there by name.
PACKAGES="iproute2 openssh-client openssh-server pdsh openmpi-bin mpich munge slurm-client slurmctld slurmd"

absent=""
for package in $PACKAGES; do
    dpkg -s "$package" >/dev/null 2>&1 || absent="$absent $package"
done
[ -z "$absent" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed, and only root on Debian can here:$absent"
    exit 0
fi
policy=/usr/sbin/policy-rc.d # Debian asks it before a package starts its service
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update -qq
for package in $absent; do
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null || echo "could not be installed: $package"
done
