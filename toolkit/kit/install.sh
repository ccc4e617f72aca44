#!/bin/sh
# Verify the parts of this kit, put them together, and install them into a Python environment without a network.
#
#   sh install.sh --check                          verify the parts, and write nothing
#   sh install.sh ENVIRONMENT [--python PYTHON]    install; a folder that is missing becomes a new virtual environment
#
# Needs a POSIX shell, the coreutils and Python. Parts are joined in $TMPDIR. Exit codes: 1 pip or the disk failed,
# 2 wrong usage, 5 a part is damaged, missing or extra, 6 no suitable Python, or a tool is missing.
set -eu
LC_ALL=C
export LC_ALL
unset CDPATH

UNPACK='
import sys, tarfile
safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
try:
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        archive.extractall(sys.argv[1], **safe)
except (OSError, tarfile.TarError) as error:
    sys.exit(f"install.sh: {error}")
'
ABI='import sys, sysconfig; print("%d.%d" % sys.version_info[:2], sysconfig.get_config_var("SOABI"))'
NEWLINE='
'
OURS=.from-a-kit # marks the sources that a later kit replaces
TOOLS='sha256sum head cut wc cat ls cp mv rm mkdir mktemp dirname'
CACHE='from medseg_trt.files import cache_folder; print(cache_folder("samples"))'

refuse() {
    code=$1
    shift
    printf 'install.sh: %s\n' "$*" >&2
    exit "$code"
}

# digest FILE: its SHA-256
digest() {
    sha256sum <"$1" | cut -d ' ' -f 1
}

# read_manifest: set project, version, python, abi, given, names, total; the last line is the digest of those before it
read_manifest() {
    [ -f "$kit/kit.manifest" ] || refuse 5 "kit.manifest is missing; copy it again (nothing was installed)"
    names='' given='' seal='' total=''
    while read -r key first second third; do
        case $key in
            kit)
                case $first in
                    1) ;;
                    *[!0-9]*) break ;; # damaged, as line ends of another system
                    *) refuse 5 "kit.manifest has form $first; this install.sh reads form 1" ;;
                esac
                ;;
            project) project=$first version=$second ;;
            python) python=$first abi=$second ;;
            given) given="$given $first" ;;
            part | file) names="$names $third" ;;
            total) total=$first ;;
            seal) seal=$first ;;
        esac
    done <"$kit/kit.manifest"
    [ -n "$seal" ] && [ "$seal" = "$(head -n -1 "$kit/kit.manifest" | sha256sum | cut -d ' ' -f 1)" ] ||
        refuse 5 "kit.manifest is damaged; copy it again (nothing was installed)"
}

# entry NAME: set kind, expected and size of a line of the manifest
entry() {
    while read -r kind expected size name; do
        [ "$name" != "$1" ] || return 0
    done <"$kit/kit.manifest"
}

# owner DIGEST: print the name of the part that has it
owner() {
    while read -r kind expected size name; do
        if [ "$kind" = part ] && [ "$expected" = "$1" ]; then
            printf '%s' "$name"
            return 0
        fi
    done <"$kit/kit.manifest"
}

complain() {
    printf 'install.sh: %s (nothing was installed)\n' "$*" >&2
    problems=$((problems + 1))
}

# check_parts: name every part that is damaged, missing, extra or in another's position
check_parts() {
    problems=0
    for wanted in $names; do
        entry "$wanted"
        if [ ! -f "$kit/$wanted" ]; then
            complain "$wanted is missing; copy it again"
            continue
        fi
        actual=$(digest "$kit/$wanted")
        [ "$actual" != "$expected" ] || continue
        other=$(owner "$actual")
        if [ -n "$other" ]; then
            complain "$wanted holds what belongs in $other; the parts were renamed: copy them again"
        elif [ "$(wc -c <"$kit/$wanted")" -ne "$size" ]; then
            complain "$wanted has $(wc -c <"$kit/$wanted") bytes instead of $size; copy it again"
        else
            complain "$wanted is damaged; copy it again"
        fi
    done
    for path in "$kit"/kit.tar.*; do
        case " $names " in
            *" ${path##*/} "*) ;;
            *) [ ! -e "$path" ] || complain "${path##*/} is no part of this kit; remove it" ;;
        esac
    done
    [ "$problems" -eq 0 ] || exit 5
    [ "$(join | sha256sum | cut -d ' ' -f 1)" = "$total" ] ||
        refuse 5 "the parts do not make the kit's archive; copy all of them again (nothing was installed)"
}

# join: write all parts, in the order of the manifest, to stdout
join() {
    for name in $names; do
        case $name in
            kit.tar.*) cat "$kit/$name" ;;
        esac
    done
}

# has_abi PYTHON: whether it can load the kit's packages
has_abi() {
    [ "$("$1" -I -c "$ABI" 2>/dev/null)" = "$python $abi" ]
}

# choose_python: set interpreter to the environment's Python, or to the one that makes a new environment
choose_python() {
    is_new=no
    if [ -e "$environment/.kit-unfinished" ]; then
        running=$(cat "$environment/.kit-unfinished")
        if [ -n "$running" ] && kill -0 "$running" 2>/dev/null; then
            refuse 1 "process $running installs into $environment; wait for it, or end it"
        fi
        rm -rf "$environment" # of a run of this script that was killed
    fi
    if [ -x "$environment/bin/python" ]; then
        interpreter=$environment/bin/python
    elif [ -x "$environment/bin/python3" ]; then
        interpreter=$environment/bin/python3
    else
        if [ -e "$environment" ] && { [ ! -d "$environment" ] || [ -n "$(ls -A "$environment")" ]; }; then
            refuse 2 "$environment exists and has no bin/python; choose another folder"
        fi
        is_new=yes
        interpreter=${chosen:-python$python}
        [ -n "$chosen" ] || command -v "$interpreter" >/dev/null || interpreter=python3
    fi
    has_abi "$interpreter" ||
        refuse 6 "this kit needs Python $python ($abi); $interpreter is $("$interpreter" -I -c "$ABI" 2>/dev/null ||
            printf 'not there'): name another with --python PATH (nothing was installed)"
}

clean() {
    rm -rf "$stage"
    if [ -e "$environment/.kit-unfinished" ]; then
        rm -rf "$environment"
    fi
}

install_packages() {
    stage=$(mktemp -d "${TMPDIR:-/tmp}/medseg-trt-kit.XXXXXX")
    trap clean EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    join | "$interpreter" -I -c "$UNPACK" "$stage" ||
        refuse 1 "the parts could not be unpacked to $stage; free space there, or set TMPDIR (nothing was installed)"
    if [ -d "$stage/project" ] && [ -e "$environment/project" ] && [ ! -e "$environment/project/$OURS" ]; then
        refuse 2 "$environment/project is not of a kit; move it elsewhere (nothing was installed)"
    fi
    if [ "$is_new" = yes ]; then
        mkdir -p "$environment"
        printf '%s' $$ >"$environment/.kit-unfinished"
        system=''
        [ -z "$given" ] || system=--system-site-packages
        # shellcheck disable=SC2086  # an empty option is none
        "$interpreter" -I -m venv --without-pip $system "$environment" || refuse 1 "$interpreter made no environment"
        interpreter=$environment/bin/python
    fi
    PIP_CONFIG_FILE=/dev/null "$interpreter" -I "$(ls "$stage"/wheels/pip-*.whl)/pip" --isolated --quiet \
        --disable-pip-version-check install --no-index --no-cache-dir --find-links "$stage/wheels" \
        --requirement "$stage/requirements.txt" ||
        refuse 1 "pip could not install into $environment; its reason is above${given:+, and this kit relies on$given there}"
}

# keep_samples: put the samples' packages into the user's cache, where medseg-trt samples get looks first
keep_samples() {
    [ -d "$stage/samples" ] || return 0
    cache=$("$interpreter" -I -c "$CACHE")
    for path in "$stage"/samples/*/*; do
        relative=${path#"$stage/samples/"}
        mkdir -p "$cache/${relative%/*}"
        cp "$path" "$cache/$relative.partial-kit"
        mv "$cache/$relative.partial-kit" "$cache/$relative"
    done
}

keep_sources() {
    [ -d "$stage/project" ] || return 0
    rm -rf "$environment/project"
    : >"$stage/project/$OURS"
    cp -R "$stage/project" "$environment/project"
}

for tool in $TOOLS; do
    command -v "$tool" >/dev/null || refuse 6 "$tool is not on PATH; install the GNU coreutils (nothing was installed)"
done
kit=$(cd "$(dirname "$0")" && pwd)
environment='' chosen='' check_only=no
while [ $# -gt 0 ]; do
    case $1 in
        --check) check_only=yes ;;
        --python)
            [ $# -gt 1 ] || refuse 2 "--python needs the path of a Python"
            shift
            chosen=$1
            ;;
        -*) refuse 2 "there is no option $1; see README.txt" ;;
        *)
            [ -z "$environment" ] || refuse 2 "name one environment; $environment and $1 are two"
            environment=$1
            ;;
    esac
    shift
done
[ "$check_only" = yes ] || [ -n "$environment" ] || refuse 2 "name a folder for the environment: sh install.sh medseg"
case $environment in
    '' | /*) ;;
    *) environment=$PWD/$environment ;;
esac
case $environment in
    *[:\'\"]* | *"$NEWLINE"*) refuse 2 "no Python starts in a folder whose path has a colon, quotes or a line break" ;;
esac
if [ -d "$environment" ]; then
    environment=$(cd "$environment" && pwd -P) # venv follows no link, and a removal would take the link alone
fi

read_manifest
check_parts
if [ "$check_only" = yes ]; then
    printf 'all parts of %s %s for Python %s are there and undamaged\n' "$project" "$version" "$python"
    exit 0
fi
choose_python
install_packages
"$environment/bin/medseg-trt" --version >/dev/null || refuse 1 "medseg-trt does not start in $environment"
keep_samples
keep_sources
rm -f "$environment/.kit-unfinished"
printf 'installed %s %s; continue with %s/bin/medseg-trt doctor\n' "$project" "$version" "$environment"
