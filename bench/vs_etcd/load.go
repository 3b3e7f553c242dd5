// A closed-loop load on etcd through its own Go client, for bench/vs_etcd.
//
// Callers share connections as in etcd's own `benchmark` tool: caller n uses connection
// n mod connections. Keys and values are those of `shardkv bench`. Prints one line of JSON.
// Built in GOPATH mode from Debian's golang-etcd-server-dev, so client and server are of one version.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/clientv3"
	"google.golang.org/grpc/grpclog"
)

var (
	endpoints   = flag.String("endpoints", "127.0.0.1:2379", "comma-separated")
	kind        = flag.String("kind", "put", "put, get (linearizable), serializable; or load, which puts every key once")
	callers     = flag.Int("callers", 64, "closed-loop callers")
	connections = flag.Int("connections", 8, "client connections that they share")
	seconds     = flag.Float64("seconds", 5, "how long to measure")
	warmUp      = flag.Float64("warm-up", 1, "seconds before that")
	keys        = flag.Int("keys", 100000, "different keys")
	valueSize   = flag.Int("value-size", 256, "bytes")
)

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// The key of that number, as shardkv/load/workload.py::bench_key makes it.
func key(number int) string {
	mixed := uint64(number) * 0x9E3779B97F4A7C15 % (95 * 95)
	return fmt.Sprintf("%c%c/bench/%012d", 0x20+mixed/95, 0x20+mixed%95, number)
}

// Random bytes: nothing that anybody could save by compressing it.
const poolBytes = 1 << 20

var pool []byte

func value(rng *rand.Rand) string {
	start := rng.Intn(poolBytes)
	return string(pool[start : start+*valueSize])
}

func main() {
	flag.Parse()
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(os.Stderr, os.Stderr, os.Stderr))
	clients := make([]*clientv3.Client, *connections)
	addresses := strings.Split(*endpoints, ",")
	for n := range clients {
		client, err := clientv3.New(clientv3.Config{Endpoints: addresses, DialTimeout: 10 * time.Second})
		if err != nil {
			fail(err)
		}
		defer client.Close()
		clients[n] = client
		// A connection is made at the first call; that is no part of what is measured.
		if _, err := client.Get(context.Background(), "connect"); err != nil {
			fail(err)
		}
	}
	pool = make([]byte, poolBytes+*valueSize)
	rand.New(rand.NewSource(1)).Read(pool)
	latencies := make([][]time.Duration, *callers)
	var loaded int64
	var wait sync.WaitGroup
	from := time.Now().Add(time.Duration(*warmUp * float64(time.Second)))
	until := from.Add(time.Duration(*seconds * float64(time.Second)))
	for n := 0; n < *callers; n++ {
		wait.Add(1)
		go func(n int) {
			defer wait.Done()
			client := clients[n%*connections]
			rng := rand.New(rand.NewSource(int64(n) + 1))
			for {
				var err error
				number := rng.Intn(*keys)
				start := time.Now()
				if *kind == "load" {
					number = int(atomic.AddInt64(&loaded, 1)) - 1
					if number >= *keys {
						return
					}
				} else if start.After(until) {
					return
				}
				switch *kind {
				case "load", "put":
					_, err = client.Put(context.Background(), key(number), value(rng))
				case "get":
					_, err = client.Get(context.Background(), key(number))
				case "serializable":
					_, err = client.Get(context.Background(), key(number), clientv3.WithSerializable())
				}
				if err != nil {
					fail(err)
				}
				if start.After(from) {
					latencies[n] = append(latencies[n], time.Since(start))
				}
			}
		}(n)
	}
	wait.Wait()
	took := time.Since(from).Seconds()
	all := []time.Duration{}
	for _, own := range latencies {
		all = append(all, own...)
	}
	sort.Slice(all, func(a, b int) bool { return all[a] < all[b] })
	if len(all) == 0 {
		fmt.Println("{}")
		return
	}
	at := func(share float64) float64 {
		index := int(share * float64(len(all)))
		if index >= len(all) {
			index = len(all) - 1
		}
		return float64(all[index].Microseconds()) / 1000
	}
	json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"ops_per_s": float64(len(all)) / took,
		"p50_ms":    at(0.5),
		"p99_ms":    at(0.99),
		"max_ms":    at(1),
	})
}
