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
    local version major minor
    version=$(qemu-system-x86_64 --version | sed -n '1s/.*version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
    read -r major minor <<<"$version"
    if ((major > 9 || (major == 9 && minor >= 2))); then
        printf 'reconnect-ms=1000'
    else
        printf 'reconnect=1'
    fi
}

# pick_accel CACHE: "kvm" or "tcg". A /dev/kvm that opens is not yet one that runs a kernel (nested
# virtualization may be broken), so this boots the cached kernel once and keeps the answer until the host
# itself is booted again. Where no kernel is cached the answer is QEMU's own "kvm:tcg": the first that starts.
pick_accel() {
    local cache=$1 answer=tcg known known_id boot_id probe
    if [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
        printf 'tcg'
        return
    fi
    if [[ ! -r $cache/vmlinuz || ! -r $cache/initramfs.gz ]]; then
        printf 'kvm:tcg'
        return
    fi
    boot_id=$(</proc/sys/kernel/random/boot_id)
    if [[ -r $cache/accel ]] && read -r known known_id <"$cache/accel" && [[ $known_id == "$boot_id" ]]; then
        printf '%s' "$known"
        return
    fi
    probe=$(mktemp "$cache/accel.XXXXXX")
    # Without a script the guest says at once that it ends, and powers off.
    if (ulimit -c 0 && exec timeout 20 qemu-system-x86_64 -M q35 -accel kvm -cpu max -m 256M -nodefaults \
        -no-user-config -display none -no-reboot -serial null -serial "file:$probe" -kernel "$cache/vmlinuz" \
        -initrd "$cache/initramfs.gz" -append 'quiet panic=-1') </dev/null >/dev/null 2>&1 &&
        grep -q '^@@guest-exit' "$probe"; then
        answer=kvm
    fi
    printf '%s %s\n' "$answer" "$boot_id" >"$probe"
    mv "$probe" "$cache/accel"
    printf '%s' "$answer"
}

# accel_options NAME: QEMU's options for what pick_accel or a person named.
accel_options() {
    case $1 in
    kvm) printf '%s\n' -accel kvm ;;
    tcg) printf '%s\n' -accel tcg,thread=multi ;;
    kvm:tcg) printf '%s\n' -accel kvm -accel tcg,thread=multi ;;
    *) die 2 "--accel $1: auto, kvm or tcg" ;;
    esac
    printf '%s\n' -cpu max
}
