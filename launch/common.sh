# shellcheck shell=bash
# What the launchers share: errors, checks of arguments, dry runs. Sourced, never run.

set -euo pipefail

ME=$(basename "$0")
DRY_RUN=false

fail() {
    echo "$ME: error: $*" >&2
    exit 2
}

# The comment at the head of a launcher is its help.
help() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
}

show() {
    local words
    printf -v words '%q ' "$@"
    echo "${words% }"
}

# Run a command; in a dry run only show it.
run() {
    if $DRY_RUN; then show "$@"; else "$@"; fi
}

# A program that must be installed; in a dry run none is needed.
need() {
    $DRY_RUN || command -v "$1" > /dev/null || fail "$1 is not installed: $2"
}

# require --option VALUE PATTERN WHAT: the value must be there and look right.
require() {
    [[ -n $2 ]] || fail "$1 is missing: $4"
    [[ $2 =~ ^($3)$ ]] || fail "$1 must be $4, not '$2'"
}

# options 'NAMES' 'FLAGS' "$@": sets the variable of each option's name, of a flag to true; --help and --dry-run all
# launchers have. What follows -- becomes `arguments`; other words become `words`, where FLAGS has WORDS.
options() {
    local named=" $1 " flags=" $2 " option
    shift 2
    arguments=() words=()
    while [[ $# -gt 0 ]]; do
        option=${1#--}
        case $1 in
            -h | --help) help ;;
            --dry-run) DRY_RUN=true ;;
            --)
                arguments=("${@:2}")
                return
                ;;
            *)
                if [[ $1 == --* && $flags == *" $option "* ]]; then
                    printf -v "$option" true
                elif [[ $1 == --* && $named == *" $option "* ]]; then
                    [[ $# -ge 2 && $2 != -- ]] || fail "$1 needs a value"
                    printf -v "$option" %s "$2"
                    shift
                elif [[ $1 != -* && $flags == *" WORDS "* ]]; then
                    words+=("$1")
                else
                    fail "there is no option $1; see --help"
                fi
                ;;
        esac
        shift
    done
}

# What to run must have been said.
something_to_run() {
    ((${#arguments[@]} > 0)) \
        || fail 'nothing to run: write -- and the arguments of read-jax, for example -- train --config ...'
}

# positive --option VALUE: a positive number.
positive() {
    require "$1" "$2" '[1-9][0-9]*' 'a positive number'
}

# label --option VALUE: a name that clouds and containers take.
label() {
    require "$1" "$2" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' \
        'lower-case letters, digits and dashes, at most 40, beginning with a letter'
}
