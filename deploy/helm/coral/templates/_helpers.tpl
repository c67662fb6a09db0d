{{/* The agent's configuration: the values', and the addresses that the manifests rely on. */}}
{{- define "coral.config" -}}
{{- $own := dict "health" "0.0.0.0:9465" "metrics" "0.0.0.0:9464" "listen" (list "unix:/run/coral/agent.sock") -}}
{{- merge $own .Values.config | toYaml -}}
{{- end }}

{{/* The image: by its digest, if there is one. */}}
{{- define "coral.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}
