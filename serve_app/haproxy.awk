# Closes the doors that the configuration of Ray Serve 2.60 leaves open. In: that configuration; out:
# the same with these changes. Ends with status 1 if it does not find what it has to change.
#
# - The admin socket is for this user only; metrics and statistics are on loopback.
# - A connection that has not sent its headers within 10 seconds is closed.
# - While three quarters of all connections are taken, an address that holds a sixteenth of them gets no
#   more: one caller cannot shut out the others and the probes.
# - HAProxy's own errors have OpenAI's shape and an id. (What is no HTTP request at all, or is cut before
#   its headers end, gets a fixed page that HAProxy 2.8 has built in.)

function error(status, type, code, message) {
    printf "    http-error status %s content-type application/json", status
    printf " lf-string '{\"error\":{\"message\":\"%s\",\"type\":\"%s\",\"param\":null,\"code\":\"%s\"}}'", \
        message, type, code
    # 32 hexadecimal digits, as the gateway's ids have; HAProxy 2.8.25 crashes on `regsub` here.
    part = "%[uuid(),bytes(0,8)]"
    printf " hdr x-request-id req_%s%s%s%s", part, part, part, part
    if (status == 503) printf " hdr retry-after 1"
    printf "\n"
}

/^[a-z]/ { section = $0; sections[section]++ }

section == "global" && $1 == "maxconn" { connections = $2 }
section == "global" && $1 == "stats" && $2 == "socket" {
    changes["admin socket"] += sub(/ mode 666 /, " mode 600 ")
}
section == "frontend prometheus" && $1 == "bind" {
    changes["metrics"] += sub(/bind :/, "bind 127.0.0.1:")
}
section == "listen stats" && $1 == "bind" {
    changes["statistics"] += sub(/bind \*:/, "bind 127.0.0.1:")
}
section == "defaults" && $1 == "errorfile" { next }

{ print }

$0 == "defaults" {
    print "    timeout http-request 10s"
    error(400, "invalid_request_error", "bad_request", "the request is not valid HTTP, or broke off")
    error(408, "invalid_request_error", "request_timeout", "the request did not arrive in time")
    error(413, "invalid_request_error", "request_too_large", "the request is too large")
    error(500, "server_error", "internal_error", \
        "The server had an error. Quote the x-request-id header when you report it.")
    error(502, "server_error", "bad_gateway", "the gateway broke off; try again")
    error(503, "server_error", "unavailable", "no gateway is ready; try again")
    error(504, "server_error", "gateway_timeout", "the gateway did not answer in time")
}
$0 == "frontend http_frontend" {
    print "    stick-table type ipv6 size 100k expire 10m store conn_cur"
    print "    tcp-request connection track-sc0 src"
    printf "    tcp-request connection reject if { fe_conn ge %d } { sc0_conn_cur gt %d }\n", \
        connections * 3 / 4, connections / 16
}

END {
    found = connections > 0 && changes["admin socket"] == 1 && changes["metrics"] == 1 && \
        changes["statistics"] == 1 && sections["defaults"] == 1 && \
        sections["frontend http_frontend"] == 1
    if (!found) {
        print "haproxy.awk: Ray's configuration of HAProxy has changed; HAProxy is not started," \
            " because its doors cannot be closed: bring serve_app/haproxy.awk up to date, or set" \
            " RAY_SERVE_ENABLE_HA_PROXY=0 for Ray Serve's own proxy" > "/dev/stderr"
        exit 1
    }
}
