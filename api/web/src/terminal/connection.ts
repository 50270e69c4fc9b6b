// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// One terminal session of a guest or a node: asks for a ticket, opens the websocket, and tells what happens. It reconnects by
// itself with growing pauses until `close` is called or the API refuses.
import { ApiError, call, errorText } from '../api/client';
import { afterGreeting, aliveFrame, dataFrame, greetingFrame, sizeFrame } from './protocol';

export type ConnectionState = { phase: 'connecting' } | { phase: 'open' } | { phase: 'waiting'; seconds: number } | { phase: 'refused'; reason: string };

interface Handlers {
  output: (bytes: Uint8Array) => void;
  state: (state: ConnectionState) => void;
  /** Terminal size to announce on each new connection. */
  size: () => { columns: number; rows: number };
}

interface TermproxyAnswer {
  user: string;
  ticket: string;
  port: number | string;
}

const ALIVE_MS = 30_000;
const PAUSE_SECONDS_MAX = 15;

export class Connection {
  private socket: WebSocket | null = null;
  private greeted = false;
  private closed = false;
  private attempts = 0;
  private retry: ReturnType<typeof setTimeout> | undefined;
  private alive: ReturnType<typeof setInterval> | undefined;

  constructor(
    /** Path of what has the terminal. */
    private readonly base: string,
    private readonly handlers: Handlers,
  ) {}

  /** Connects now, also when it waits or was refused. */
  async connect(): Promise<void> {
    this.drop();
    this.closed = false;
    this.handlers.state({ phase: 'connecting' });
    try {
      const answer = await call<TermproxyAnswer>('POST', `${this.base}/termproxy`);
      if (!this.closed) this.open(answer);
    } catch (error) {
      if (this.closed) return;
      if (error instanceof ApiError && error.status === 0) this.waitAndRetry();
      else this.handlers.state({ phase: 'refused', reason: errorText(error) });
    }
  }

  send(text: string): void {
    if (this.greeted) this.socket?.send(dataFrame(text));
  }

  resize(columns: number, rows: number): void {
    if (this.greeted) this.socket?.send(sizeFrame(columns, rows));
  }

  close(): void {
    this.closed = true;
    this.drop();
  }

  private drop(): void {
    clearTimeout(this.retry);
    clearInterval(this.alive);
    const old = this.socket;
    this.socket = null;
    this.greeted = false;
    old?.close();
  }

  private open(answer: TermproxyAnswer): void {
    const query = new URLSearchParams({ port: String(answer.port), vncticket: answer.ticket });
    const scheme = location.protocol === 'https:' ? 'wss' : 'ws';
    const socket = new WebSocket(`${scheme}://${location.host}/api2/json${this.base}/vncwebsocket?${query}`, 'binary');
    socket.binaryType = 'arraybuffer';
    this.socket = socket;
    socket.onopen = () => socket.send(greetingFrame(answer.user, answer.ticket));
    socket.onmessage = (event) => this.receive(new Uint8Array(event.data as ArrayBuffer));
    socket.onclose = () => {
      if (this.socket === socket && !this.closed) this.waitAndRetry();
    };
  }

  private receive(bytes: Uint8Array): void {
    if (this.greeted) return this.handlers.output(bytes);
    const rest = afterGreeting(bytes);
    if (!rest) {
      this.close();
      return this.handlers.state({ phase: 'refused', reason: 'The console refused its ticket.' });
    }
    this.greeted = true;
    this.attempts = 0;
    const { columns, rows } = this.handlers.size();
    this.socket?.send(sizeFrame(columns, rows));
    this.alive = setInterval(() => this.socket?.send(aliveFrame()), ALIVE_MS);
    this.handlers.state({ phase: 'open' });
    if (rest.length > 0) this.handlers.output(rest);
  }

  private waitAndRetry(): void {
    this.drop();
    const seconds = Math.min(PAUSE_SECONDS_MAX, 2 ** this.attempts);
    this.attempts += 1;
    this.handlers.state({ phase: 'waiting', seconds });
    this.retry = setTimeout(() => void this.connect(), seconds * 1000);
  }
}
