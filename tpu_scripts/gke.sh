#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet (https://jobset.sigs.k8s.io): it starts one pod per host and
# restarts all of them together when one is lost, so a preempted run resumes from its last checkpoint.
#
#   tpu_scripts/gke.sh apply --name run1 --topology v5e:2x4 --image REGISTRY/jaxsteer --bucket gs://mine/run1 \
#       configs/listops_smollm2.py --optim.lr 3e-3
#   tpu_scripts/gke.sh watch --name run1              # until it finishes or fails; names failed pods
#   tpu_scripts/gke.sh logs --name run1 --follow      # of every pod, each line with the pod's name
#   tpu_scripts/gke.sh delete --name run1             # the run stays in the bucket
#   tpu_scripts/gke.sh render ...                     # like apply, but only print the manifest
#
# The cluster needs the JobSet controller, the Cloud Storage FUSE CSI driver and one TPU node pool per slice; apply says
# of which machine type. The run folder is --bucket, mounted in every pod; if it already holds a run, apply resumes it.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

VERB=${1:-}
case $VERB in
  render | apply | watch | logs | delete) shift ;;
  -h | --help) ;;
  *) die "got '$VERB'" "the first word must be render, apply, watch, logs or delete; see --help" ;;
esac
parse "name topology slices spot image bucket namespace service-account max-restarts lines follow" "$@"
need name
IN=(--namespace="$NAMESPACE")
PODS=--selector=jobset.sigs.k8s.io/jobset-name=$NAME

# json WORDS: the words as JSON strings, separated by commas; also valid YAML.
json() {
  local word list=
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    list+="${list:+, }\"$word\""
  done
  printf '%s' "$list"
}

render() {
  local folder=${BUCKET#gs://} text key i
  local command=(bash tpu_scripts/worker.sh pod --out "/bucket/${folder#*/}" -- "${REST[@]}")
  # Kubernetes expands $(NAME) in a command; doubling the dollar escapes it.
  for i in "${!command[@]}"; do command[i]=${command[i]//"\$("/"\$\$("}; done
  local -A fill=(
    [NAME]=$NAME [NAMESPACE]=$NAMESPACE [MAX_RESTARTS]=$MAX_RESTARTS [SLICES]=$SLICES [HOSTS]=$HOSTS
    [SERVICE_ACCOUNT]=$(json "$SERVICE_ACCOUNT") [IMAGE]=$(json "$IMAGE") [BUCKET_NAME]=$(json "${folder%%/*}")
    [GKE_ACCELERATOR]=$GKE_ACCELERATOR [SHAPE]=${TOPOLOGY#*:} [CHIPS_PER_HOST]=$((CHIPS / HOSTS))
    [TOKEN]=$(date +%s)
    [COMMAND]="[$(json "${command[@]}")]"
  )
  text=$(grep -v '^#' "$SCRIPTS/jobset.yaml")
  if ((SPOT)); then text=${text/ # @SPOT@/}; else text=$(grep -v '@SPOT@' <<<"$text"); fi
  for key in "${!fill[@]}"; do text=${text//"@$key@"/"${fill[$key]}"}; done
  printf '%s\n' "$text"
}

prepare() {
  need topology image bucket
  ((${#REST[@]})) || die "no CONFIG given" "for example: gke.sh $VERB ... configs/listops_smollm2.py"
  for word in "${REST[@]}"; do
    case $word in
      --out | --out=* | --resume | --resume=*)
        die "${word%%=*} is not needed" "the run folder is --bucket, and an existing run is resumed"
        ;;
    esac
  done
  check_run "${REST[@]}"
  [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || die "--max-restarts: must be a whole number, got '$MAX_RESTARTS'"
  lookup "$TOPOLOGY"
  if ((SLICES > 1 && HOSTS == 1)); then
    die "GKE joins only slices of several hosts, and $TOPOLOGY has one" "use a larger --topology, or --slices 1"
  fi
  say "This needs $SLICES node pool(s) of $HOSTS node(s), machine type $GKE_MACHINE, topology ${TOPOLOGY#*:}."
}

pod_phases() {
  local line='{.metadata.name}{" "}{.status.phase}{"\n"}'
  kubectl get pods "${IN[@]}" "$PODS" --output=jsonpath="{range .items[*]}$line{end}"
}

watch() {
  local began=$SECONDS shown=-60 before='' now conditions phases pod phase
  local get=(kubectl get jobset "$NAME" "${IN[@]}")
  if ((DRY_RUN)); then
    quoted "${get[@]}" --output=jsonpath='{.status.conditions[?(@.status=="True")].type}'
    return
  fi
  while :; do
    conditions=$("${get[@]}" --output=jsonpath='{.status.conditions[?(@.status=="True")].type}') ||
      die "cannot get JobSet $NAME" "see kubectl's message above; was it applied, and in --namespace $NAMESPACE?"
    phases=$(pod_phases || true)
    now="restarts $("${get[@]}" --output=jsonpath='{.status.restarts}' || true), pods: $(
      awk '{n[$2]++} END {for (phase in n) printf "%d %s  ", n[phase], phase}' <<<"$phases"
    )"
    if [[ $now != "$before" ]] || ((SECONDS - shown >= 60)); then
      say "[$(elapsed "$began")] $now"
      before=$now shown=$SECONDS
    fi
    case " $conditions " in
      *' Completed '*) say "The training has finished; its run is in the bucket." && return ;;
      *' Failed '*)
        while read -r pod phase; do
          if [[ $phase != Failed ]]; then continue; fi
          say "$pod failed; its last lines:"
          kubectl logs "$pod" "${IN[@]}" --container=train --tail=20 >&2 </dev/null || true
        done <<<"$phases"
        die "JobSet $NAME failed" "the run stays in the bucket: fix the cause, gke.sh delete, then gke.sh apply"
        ;;
    esac
    sleep "$POLL"
  done
}

case $VERB in
  render)
    prepare
    render
    ;;
  apply)
    prepare
    if ((DRY_RUN)); then
      printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$(render)"
    else
      render | kubectl apply --filename=- ||
        die "JobSet $NAME was not applied" "if one of this name already exists, gke.sh delete it first"
      say "Applied. Next: tpu_scripts/gke.sh watch --name $NAME"
    fi
    ;;
  watch)
    nothing_left
    watch
    ;;
  logs)
    nothing_left
    command=(kubectl logs "${IN[@]}" "$PODS" --container=train --prefix --tail="$LINES" --max-log-requests=512)
    if ((FOLLOW)); then command+=(--follow); fi
    run "${command[@]}"
    ;;
  delete)
    nothing_left
    run kubectl delete jobset "$NAME" "${IN[@]}" --ignore-not-found
    ;;
esac
