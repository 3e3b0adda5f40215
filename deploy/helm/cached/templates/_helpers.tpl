{{- define "cached.name" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "cached.selector" -}}
app.kubernetes.io/name: cached
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "cached.labels" -}}
{{ include "cached.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "cached.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "cached.serviceAccount" -}}
{{- default (ternary (include "cached.name" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "cached.priorityClass" -}}
{{- default (ternary (include "cached.name" .) "" .Values.priorityClass.create) .Values.priorityClass.name -}}
{{- end -}}

{{- define "cached.catalogMap" -}}
{{- default (printf "%s-catalog" (include "cached.name" .)) .Values.catalog.existingConfigMap -}}
{{- end -}}

{{- /* Whether the daemon speaks with the cluster's API. */ -}}
{{- define "cached.fleet" -}}
{{- if or .Values.fleet.nodeLabels .Values.fleet.slots -}}true{{- end -}}
{{- end -}}

{{- /* "16Gi" as a number of MiB. */ -}}
{{- define "cached.mib" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- if hasSuffix "Ti" . -}}{{ mul $number 1048576 }}{{- else if hasSuffix "Gi" . -}}{{ mul $number 1024 }}{{- else -}}{{ $number }}{{- end -}}
{{- end -}}

{{- define "cached.quantity" -}}
{{- if eq (mod . 1024) 0 -}}{{ div . 1024 }}Gi{{- else -}}{{ . }}Mi{{- end -}}
{{- end -}}

{{- /* Everything that may lie in shared memory. */ -}}
{{- define "cached.sharedMemory" -}}
{{- $capacity := include "cached.mib" .Values.l1.capacity | int64 -}}
{{- $transient := include "cached.mib" .Values.l1.transient | int64 -}}
{{- include "cached.quantity" (add $capacity $transient) -}}
{{- end -}}

{{- /* Shared memory counts for the pod that touched it first, so the limit holds both. */ -}}
{{- define "cached.memory" -}}
{{- $capacity := include "cached.mib" .Values.l1.capacity | int64 -}}
{{- $transient := include "cached.mib" .Values.l1.transient | int64 -}}
{{- $heap := include "cached.mib" .Values.l1.heap | int64 -}}
{{- include "cached.quantity" (add $capacity $transient $heap) -}}
{{- end -}}

{{- define "cached.drivePaths" -}}
{{- $paths := list -}}
{{- range $index, $_ := .Values.l2.drives -}}{{- $paths = append $paths (printf "/var/lib/cached-drives/%d" $index) -}}{{- end -}}
{{- toJson $paths -}}
{{- end -}}

{{- /* The daemon's settings: what .Values.config says, and over it what the manifests depend on. */ -}}
{{- define "cached.config" -}}
{{- $set := deepCopy .Values.config -}}
{{- /* Workers that see the sockets only must not see links that lead nowhere for them. */ -}}
{{- $models := ternary "/run/cached/models" "/var/lib/cached/models" .Values.directoryView -}}
{{- $daemon := dict "socket" "/run/cached/cached.sock" "state_dir" "/var/lib/cached" "models_dir" $models "catalog" "/etc/cached/catalog/catalog.json" "log_format" "json" "drain_timeout_s" .Values.drainSeconds -}}
{{- $l1 := dict "path" "/dev/cached" "capacity" (printf "%siB" (trimSuffix "i" .Values.l1.capacity)) "transient_capacity" (printf "%siB" (trimSuffix "i" .Values.l1.transient)) -}}
{{- if .Values.directoryView -}}{{- $_ := set $l1 "segment_mode" "0640" -}}{{- end -}}
{{- $l2 := dict "enabled" .Values.l2.enabled "capacity" .Values.l2.capacity -}}
{{- if .Values.l2.drives -}}{{- $_ := set $l2 "paths" (include "cached.drivePaths" . | fromJsonArray) -}}{{- end -}}
{{- $http := dict "listen" (printf "%s:%d" .Values.http.address (int .Values.http.port)) -}}
{{- $computed := dict "daemon" $daemon "l1" $l1 "l2" $l2 "http" $http -}}
{{- if .Values.caBundle.configMap -}}
{{- $bundle := printf "/etc/cached/ca/%s" .Values.caBundle.key -}}
{{- $computed = merge $computed (dict "s3" (dict "ca_bundle" $bundle) "hf" (dict "ca_bundle" $bundle)) -}}
{{- end -}}
{{- if .Values.credentials.hubTokenKey -}}
{{- $computed = mergeOverwrite $computed (dict "hf" (dict "token_file" (printf "/etc/cached/secrets/%s" .Values.credentials.hubTokenKey))) -}}
{{- end -}}
{{- if .Values.tcp.port -}}
{{- $tcp := dict "listen" (printf "%s:%d" .Values.http.address (int .Values.tcp.port)) "cert" "/etc/cached/tls/tls.crt" "key" "/etc/cached/tls/tls.key" "client_ca" "/etc/cached/tls/ca.crt" "clients" .Values.tcp.clients "operators" .Values.tcp.operators -}}
{{- $computed = mergeOverwrite $computed (dict "tcp" $tcp) -}}
{{- end -}}
{{- if include "cached.fleet" . -}}
{{- $computed = mergeOverwrite $computed (dict "fleet" (dict "node_labels" .Values.fleet.nodeLabels "slots" .Values.fleet.slots "namespace" .Release.Namespace)) -}}
{{- end -}}
{{- range $section, $entries := mergeOverwrite $set $computed }}
[{{ $section }}]
{{- range $key, $value := $entries }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{ end -}}
{{- end -}}

{{- /* The folders that the init step and the daemon both see. */ -}}
{{- define "cached.hostMounts" -}}
- name: run
  mountPath: /run/cached
- name: state
  mountPath: /var/lib/cached
- name: l1
  mountPath: /dev/cached
{{- range $index, $path := include "cached.drivePaths" . | fromJsonArray }}
- name: drive-{{ $index }}
  mountPath: {{ $path }}
{{- end }}
{{- end -}}
