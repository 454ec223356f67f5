// SPDX-License-Identifier: Apache-2.0
/*
 * A load generator for NBD that batches: whatever replies one read brought are answered by new requests in
 * one write. fio's nbd engine makes a system call or two per request and is the limit of what it measures;
 * this one leaves most of a processor to the server.
 *
 *     nbdload -u SOCKET -e EXPORT -o randread|randwrite|seqread -b 4096 -d 32 -c 1 -s 2.0
 *
 * One thread serves all connections. It prints one line of JSON: ops, seconds, bytes, latency_p50_us and
 * latency_p99_us.
 * Latency is from the batch's write to the read that brought the reply.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 256, MAX_DEPTH = 1024, INPUT_SIZE = 4 << 20, BUCKETS = 64 * 16 };
enum { REQUEST_SIZE = 28, REPLY_SIZE = 16, CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2 };

struct connection {
    int fd;
    uint64_t sequential;          // next offset of seqread
    uint64_t sent_ns[MAX_DEPTH];  // when the request of each slot went out; the slot is the cookie
    uint16_t ready[MAX_DEPTH];    // slots to be sent with the next write
    unsigned n_ready, n_flying;
    unsigned char *input;         // a reply header that was cut lies at its beginning
    size_t have;                  // bytes of such a header
    uint64_t skip;                // payload bytes of the current reply that are still to come
    unsigned char *output;        // bytes to write, and how many of them are written
    size_t out_size, out_done;
};

static struct connection connections[MAX_CONNECTIONS];
static uint64_t histogram[BUCKETS], ops, random_state = 88172645463325252ull;
static uint64_t export_size, block_size = 4096;
static unsigned depth = 32, n_connections = 1;
static int writing, sequential;

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "nbdload: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

// 16 buckets for each power of two: 6 % of error.
static unsigned bucket_of(uint64_t ns)
{
    if (ns < 16)
        return ns;
    unsigned log = 63 - __builtin_clzll(ns);
    return (log - 3) * 16 + ((ns >> (log - 4)) & 15);
}

static double bucket_us(unsigned bucket)
{
    if (bucket < 16)
        return bucket / 1000.0;
    return ((16ull + bucket % 16) << (bucket / 16 - 1)) / 1000.0;
}

static double percentile_us(double fraction)
{
    uint64_t sum = 0, target = ops * fraction;
    for (unsigned i = 0; i < BUCKETS; i++)
        if ((sum += histogram[i]) > target)
            return bucket_us(i);
    return 0;
}

static void read_all(int fd, void *to, size_t size)
{
    for (char *at = to; size;) {
        ssize_t n = read(fd, at, size);
        if (n <= 0)
            die("the server closed the connection in negotiation");
        at += n, size -= n;
    }
}

static void write_all(int fd, const void *from, size_t size)
{
    if (write(fd, from, size) != (ssize_t)size)
        die("cannot write in negotiation: %s", strerror(errno));
}

// Fixed newstyle negotiation with NBD_OPT_GO and no other option: simple replies follow.
static int negotiate(const char *path, const char *export)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die("the path of the socket is too long");
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (void *)&address, sizeof address) < 0)
        die("cannot connect to %s: %s", path, strerror(errno));

    unsigned char greeting[18];
    read_all(fd, greeting, sizeof greeting);
    if (memcmp(greeting, "NBDMAGICIHAVEOPT", 16) != 0)
        die("the server's greeting is not that of newstyle NBD");

    uint32_t name_size = strlen(export);
    unsigned char go[4 + 16 + 4 + 4096 + 2] = {0};
    if (name_size > 4096)
        die("the export's name is too long");
    uint32_t flags = htobe32(3), option = htobe32(7);
    uint32_t length = htobe32(4 + name_size + 2), size = htobe32(name_size);
    memcpy(go, &flags, 4);
    memcpy(go + 4, "IHAVEOPT", 8);
    memcpy(go + 12, &option, 4);
    memcpy(go + 16, &length, 4);
    memcpy(go + 20, &size, 4);
    memcpy(go + 24, export, name_size);
    write_all(fd, go, 24 + name_size + 2);

    for (;;) {
        unsigned char head[20], body[4096];
        read_all(fd, head, sizeof head);
        uint32_t type = be32toh(*(uint32_t *)(head + 12)), body_size = be32toh(*(uint32_t *)(head + 16));
        if (body_size > sizeof body)
            die("an option reply of %u bytes", body_size);
        read_all(fd, body, body_size);
        if (type == 1)
            return fd;
        if (type & 0x80000000u)
            die("the server refused export '%s': error 0x%x", export, type);
        if (type == 3 && body_size >= 12 && body[0] == 0 && body[1] == 0) {
            uint64_t bytes;
            memcpy(&bytes, body + 2, 8);
            export_size = be64toh(bytes);
        }
    }
}

static void put_request(unsigned char *to, struct connection *c, unsigned slot)
{
    uint64_t blocks = export_size / block_size, offset;
    if (sequential) {
        offset = c->sequential;
        c->sequential = offset + 2 * block_size > export_size ? 0 : offset + block_size;
    } else {
        offset = next_random() % blocks * block_size;
    }
    uint32_t magic = htobe32(0x25609513), length = htobe32(block_size);
    uint16_t flags = 0, command = htobe16(writing ? CMD_WRITE : CMD_READ);
    uint64_t cookie = slot, from = htobe64(offset);
    memcpy(to, &magic, 4);
    memcpy(to + 4, &flags, 2);
    memcpy(to + 6, &command, 2);
    memcpy(to + 8, &cookie, 8);
    memcpy(to + 16, &from, 8);
    memcpy(to + 24, &length, 4);
}

// Put all free slots into one buffer, and write as much of it as the socket takes.
static void send_requests(struct connection *c, uint64_t now)
{
    if (c->out_done == c->out_size) {
        c->out_size = c->out_done = 0;
        for (unsigned i = 0; i < c->n_ready; i++) {
            put_request(c->output + c->out_size, c, c->ready[i]);
            c->sent_ns[c->ready[i]] = now;
            c->out_size += REQUEST_SIZE + (writing ? block_size : 0);  // the payload is there already
        }
        c->n_flying += c->n_ready;
        c->n_ready = 0;
    }
    while (c->out_done < c->out_size) {
        size_t left = c->out_size - c->out_done;
        ssize_t n = send(c->fd, c->output + c->out_done, left, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0)
            die("cannot send: %s", strerror(errno));
        c->out_done += n;
    }
}

static void take_replies(struct connection *c, uint64_t now)
{
    ssize_t n = recv(c->fd, c->input + c->have, INPUT_SIZE - c->have, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0)
        die("the server closed the connection");
    unsigned char *at = c->input, *end = c->input + c->have + n;
    for (;;) {
        uint64_t skipped = c->skip < (uint64_t)(end - at) ? c->skip : (uint64_t)(end - at);
        at += skipped;
        c->skip -= skipped;
        if (c->skip || end - at < REPLY_SIZE)
            break;
        uint32_t magic, error;
        uint64_t slot;
        memcpy(&magic, at, 4);
        memcpy(&error, at + 4, 4);
        memcpy(&slot, at + 8, 8);
        if (magic != htobe32(0x67446698))
            die("a reply with the wrong magic 0x%x", be32toh(magic));
        if (error)
            die("the server answered a request with error %u", be32toh(error));
        if (slot >= depth)
            die("a reply with a cookie that we never sent");
        at += REPLY_SIZE;
        c->skip = writing ? 0 : block_size;
        c->ready[c->n_ready++] = slot;
        c->n_flying--;
        uint64_t taken = now - c->sent_ns[slot];
        unsigned bucket = bucket_of(taken);
        histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
        ops++;
    }
    c->have = end - at;
    memmove(c->input, at, c->have);
}

static void wait_and_serve(struct pollfd *fds, uint64_t *now, int stopping)
{
    for (unsigned i = 0; i < n_connections; i++)
        fds[i].events = POLLIN | (connections[i].out_done < connections[i].out_size ? POLLOUT : 0);
    if (poll(fds, n_connections, 1000) < 0 && errno != EINTR)
        die("poll: %s", strerror(errno));
    *now = now_ns();
    for (unsigned i = 0; i < n_connections; i++) {
        struct connection *c = &connections[i];
        if (fds[i].revents & (POLLIN | POLLHUP | POLLERR))
            take_replies(c, *now);
        if (stopping ? c->out_done < c->out_size : c->n_ready || c->out_done < c->out_size)
            send_requests(c, *now);
    }
}

// Take leave: all replies in, then NBD_CMD_DISC, so that no server has to complain of a lost client.
static void disconnect(struct pollfd *fds, uint64_t now)
{
    for (uint64_t give_up = now + 5000000000ull; now < give_up;) {
        unsigned flying = 0;
        for (unsigned i = 0; i < n_connections; i++)
            flying += connections[i].n_flying || connections[i].skip;
        if (!flying)
            break;
        wait_and_serve(fds, &now, 1);
    }
    for (unsigned i = 0; i < n_connections; i++) {
        unsigned char request[REQUEST_SIZE] = {0x25, 0x60, 0x95, 0x13, 0, 0, 0, CMD_DISC};
        send(connections[i].fd, request, sizeof request, MSG_NOSIGNAL);
        close(connections[i].fd);
    }
}

int main(int argc, char **argv)
{
    const char *path = NULL, *export = "", *op = "randread";
    double seconds = 2;
    for (int option; (option = getopt(argc, argv, "u:e:o:b:d:c:s:")) != -1;) {
        switch (option) {
        case 'u': path = optarg; break;
        case 'e': export = optarg; break;
        case 'o': op = optarg; break;
        case 'b': block_size = strtoull(optarg, NULL, 0); break;
        case 'd': depth = atoi(optarg); break;
        case 'c': n_connections = atoi(optarg); break;
        case 's': seconds = atof(optarg); break;
        default: die("the options are -u SOCKET -e EXPORT -o OP -b BYTES -d DEPTH -c CONNECTIONS -s SECONDS");
        }
    }
    writing = strcmp(op, "randwrite") == 0;
    sequential = strcmp(op, "seqread") == 0;
    if (!path || (!writing && !sequential && strcmp(op, "randread") != 0))
        die("needs -u SOCKET, and -o randread, randwrite or seqread");
    if (depth < 1 || depth > MAX_DEPTH || n_connections < 1 || n_connections > MAX_CONNECTIONS)
        die("depth is 1 to %d, connections 1 to %d", MAX_DEPTH, MAX_CONNECTIONS);
    if (block_size < 1 || block_size > 32 << 20)
        die("a block has 1 byte to 32 MiB");

    struct pollfd fds[MAX_CONNECTIONS];
    for (unsigned i = 0; i < n_connections; i++) {
        struct connection *c = &connections[i];
        c->fd = negotiate(path, export);
        if (export_size < block_size)
            die("the export is smaller than a block");
        c->sequential = export_size / block_size * i / n_connections * block_size;
        c->input = malloc(INPUT_SIZE);
        size_t out_size = (REQUEST_SIZE + (writing ? block_size : 0)) * depth;
        c->output = malloc(out_size);
        if (!c->input || !c->output)
            die("no memory");
        for (size_t at = 0; at < out_size; at++)
            c->output[at] = at * 2654435761u >> 13;
        for (unsigned slot = 0; slot < depth; slot++)
            c->ready[c->n_ready++] = slot;
        fds[i].fd = c->fd;
    }

    uint64_t start = now_ns(), now = start, end = start + seconds * 1e9;
    for (unsigned i = 0; i < n_connections; i++)
        send_requests(&connections[i], now);
    while (now < end)
        wait_and_serve(fds, &now, 0);
    double taken = (now - start) / 1e9;
    printf("{\"ops\": %lu, \"seconds\": %.6f, \"bytes\": %lu, ", (unsigned long)ops, taken,
           (unsigned long)(ops * block_size));
    printf("\"latency_p50_us\": %.2f, \"latency_p99_us\": %.2f}\n", percentile_us(0.5), percentile_us(0.99));
    fflush(stdout);
    disconnect(fds, now);
    return 0;
}
