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

# Whether an argument is --overwrite, which read-jax takes shortened too.
overwrites() {
    [[ $1 == --ov* && "--overwrite" == "$1"* ]]
}

# What was done is not to be done again: leaves --overwrite out of `arguments`.
keep_what_is_done() {
    local argument kept=()
    for argument in "${arguments[@]}"; do
        overwrites "$argument" || kept+=("$argument")
    done
    arguments=("${kept[@]}")
}

# A job that comes back is given the same arguments, and must not discard its own answers.
nothing_to_overwrite() {
    local argument
    for argument in "${arguments[@]}"; do
        ! overwrites "$argument" || fail "--overwrite would discard the job's own results whenever it begins again:" \
            'remove the earlier results first, or write into another folder'
    done
}

# positive --option VALUE: a positive number.
positive() {
    require "$1" "$2" '[1-9][0-9]*' 'a positive number'
}

# project: where one was given, it must look right; an old one has its domain before it.
project() {
    [[ -z $project ]] || require --project "$project" '[a-z0-9]([a-z0-9.:-]*[a-z0-9])?' 'the id of a project'
}

# tpu --option VALUE: a type of TPU, in a size that can be.
tpu() {
    local size=${2##*-}
    require "$1" "$2" '(v4|v5p|v6e|v5litepod)-[1-9][0-9]{0,4}' 'such as v5litepod-16, v5p-32, v6e-16 or v4-32'
    case $2 in
        v5litepod-*) require "$1" "$size" '1|4|8|16|32|64|128|256' 'v5litepod- with 1, 4, 8, 16, 32, 64, 128 or 256' ;;
        v6e-*) ((size == 1 || size % 4 == 0)) || fail "$1 must be v6e- with 1 or a multiple of 4, not '$2'" ;;
        *) ((size % 2 == 0)) || fail "$1 must be ${2%-*}- with an even number, for every chip counts twice, not '$2'" ;;
    esac
}

# label --option VALUE: a name that clouds and containers take.
label() {
    require "$1" "$2" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' \
        'lower-case letters, digits and dashes, at most 40, beginning with a letter'
}
