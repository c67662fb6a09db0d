{{/* The agent's configuration: the values', and the addresses that the manifests rely on. */}}
{{- define "coral.config" -}}
{{- $own := dict "health" "0.0.0.0:9465" "metrics" "0.0.0.0:9464" "listen" (list "unix:/run/coral/agent.sock") -}}
{{- if .Values.grpc.tlsSecret -}}
{{- $tls := dict "certificate" "/etc/coral-tls/tls.crt" "key" "/etc/coral-tls/tls.key" -}}
{{- if not (dig "tls" "client_ca" "" .Values.config) -}}
{{- $_ := set $tls "client_certificates" "none" -}}
{{- end -}}
{{- $_ := set $own "listen" (append $own.listen "0.0.0.0:9001") -}}
{{- $_ := set $own "tls" $tls -}}
{{- end -}}
{{- merge $own .Values.config | toYaml -}}
{{- end }}

{{/* The image: by its digest, if there is one. */}}
{{- define "coral.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}
{{- else }}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Whether the agent calls the API server: then it has a token, and a way there. */}}
{{- define "coral.token" -}}
{{- or .Values.serviceAccount.token .Values.serviceAccount.pods .Values.serviceAccount.reviews -}}
{{- end }}

{{/* Binds the agent's account, by a binding of the second name, to the ClusterRole of the third. */}}
{{- define "coral.binding" }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ index . 1 }}
  labels:
    app.kubernetes.io/name: coral-agent
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ index . 2 }}
subjects:
  - kind: ServiceAccount
    name: coral-agent
    namespace: {{ (index . 0).Release.Namespace }}
{{- end }}
