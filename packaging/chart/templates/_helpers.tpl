{{- /* Names of services have at most 63 characters, and theirs add 13: `-wireguard-10`. */ -}}
{{- define "siderolink.name" -}}
{{- printf "%s" (ternary .Release.Name (printf "%s-siderolink" .Release.Name) (contains "siderolink" .Release.Name)) | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "siderolink.selector" -}}
app.kubernetes.io/name: siderolink
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "siderolink.labels" -}}
{{ include "siderolink.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "siderolink.tokenSecret" -}}
{{- .Values.joinToken.existingSecret | default (printf "%s-join-token" (include "siderolink.name" .)) -}}
{{- end }}

{{- define "siderolink.stateKeySecret" -}}
{{- .Values.stateKey.existingSecret | default (printf "%s-state-key" (include "siderolink.name" .)) -}}
{{- end }}

{{- /* One entry for each server: its endpoint, and what its own service needs. */ -}}
{{- define "siderolink.servers" -}}
{{- $one := dict "endpoint" .Values.wireguard.endpoint "nodePort" .Values.wireguard.service.nodePort "loadBalancerIP" .Values.wireguard.service.loadBalancerIP }}
{{- $servers := .Values.wireguard.servers | default (list $one) }}
{{- if and (gt (len $servers) 1) (not .Values.postgres.url) }}
{{- fail "several servers (wireguard.servers) share a database: postgres.url is required" }}
{{- end }}
{{- toYaml $servers }}
{{- end }}

{{- define "siderolink.serve" -}}
{{- $set := dict
  "api-listen" (printf "[::]:%v" .Values.api.port)
  "wireguard-endpoint" (required "wireguard.endpoint is required: host:port at which machines reach the WireGuard service" .server.endpoint)
  "wireguard-listen-port" (int .Values.wireguard.port)
  "join-token-file" "/run/secrets/join-token/join-token"
  "metrics-listen" (printf "[::]:%v" .Values.metrics.port) -}}
{{- if .Values.api.tlsSecret }}
{{- $_ := set $set "tls-cert" "/run/secrets/tls/tls.crt" }}
{{- $_ := set $set "tls-key" "/run/secrets/tls/tls.key" }}
{{- end }}
{{- if .Values.postgres.url }}
{{- $_ := set $set "store" .Values.postgres.url }}
{{- $_ := set $set "state-key-file" "/run/secrets/state-key/state-key" }}
{{- $_ := set $set "peer-listen" (printf "[::]:%v" .Values.peers.port) }}
{{- $_ := set $set "peer-address" (printf "%s-%d.%s-peers:%v" (include "siderolink.name" .) .number (include "siderolink.name" .) .Values.peers.port) }}
{{- if .Values.postgres.existingSecret }}
{{- $_ := set $set "store-password-file" "/run/secrets/postgres/password" }}
{{- end }}
{{- else }}
{{- $_ := set $set "state" "/var/lib/siderolink/siderolink.state" }}
{{- end }}
{{- toYaml (merge (deepCopy .Values.settings) $set) }}
{{- end }}
