# Shared by the scripts of this directory; sourced, never run.
# shellcheck shell=bash

# Where the guests' kernels, initramfs archives and programs are kept between runs.
cache_dir() {
    printf '%s/vhost-user-blkmq' "${XDG_CACHE_HOME:-${HOME:?set HOME or XDG_CACHE_HOME, the guests are cached there}/.cache}"
}

# die STATUS MESSAGE: one line on stderr, named after the script, then out.
die() {
    printf '%s: %s\n' "qemu/${0##*/}" "$2" >&2
    exit "$1"
}

# is_number TEXT: a whole number above zero.
is_number() {
    [[ $1 =~ ^[1-9][0-9]*$ ]]
}

# The chardev option that makes QEMU come back to a daemon that was restarted.
# Seconds until 9.1; milliseconds since 9.2, which deprecates the old name.
reconnect_option() {
    local version
    version=$(qemu-system-x86_64 --version | sed -n '1s/.*version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
    read -r major minor <<<"$version"
    if ((major > 9 || (major == 9 && minor >= 2))); then
        printf 'reconnect-ms=1000'
    else
        printf 'reconnect=1'
    fi
}

# A /dev/kvm that opens is not yet one that runs a kernel (nested virtualization may be broken or
# emulated), so "auto" boots the cached kernel once and keeps the answer for this boot of the host.
pick_accel() {
    local cache=$1 answer boot_id
    if [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
        printf 'tcg'
        return
    fi
    boot_id=$(</proc/sys/kernel/random/boot_id)
    if [[ -r $cache/accel ]] && read -r answer known_id <"$cache/accel" && [[ $known_id == "$boot_id" ]]; then
        printf '%s' "$answer"
        return
    fi
    answer=tcg
    # The initramfs' init finds no script, says so and powers off: QEMU ends with status 0.
    if timeout 20 qemu-system-x86_64 -M q35 -accel kvm -cpu host -m 256M -nodefaults -display none -no-reboot \
        -serial null -serial file:"$cache/accel.$$" -kernel "$cache/vmlinuz" -initrd "$cache/initramfs.gz" \
        -append 'quiet panic=-1' </dev/null >/dev/null 2>&1 && grep -q '^@@guest-exit' "$cache/accel.$$"; then
        answer=kvm
    fi
    rm -f "$cache/accel.$$"
    printf '%s %s\n' "$answer" "$boot_id" >"$cache/accel.new.$$" && mv "$cache/accel.new.$$" "$cache/accel"
    printf '%s' "$answer"
}
