# ---- variables of all processes; those that are set already win
cd "{{ folder }}" || exit
run={{ run }}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-{{ num_threads }}} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
cache={{ cache_dir }} # on a disk of each node: compiled ops and kernels do not belong on a shared home
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/torch_extensions}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
{% if interface %}
export NCCL_SOCKET_IFNAME={{ interface | quote }} GLOO_SOCKET_IFNAME={{ interface | quote }}
{% endif %}
{% for name, value in env.items() %}
export {{ name }}={{ value | quote }}
{% endfor %}
{% if env %}
export ARDTRAIN_EXPORT="{{ env | join(" ") }}" # these go to the other hosts as well
{% endif %}
{% for line in setup %}
{{ line }} || exit
{% endfor %}
mkdir -p "$run/logs"
