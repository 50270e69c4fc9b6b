// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Numbers and times as people read them. Sizes are binary units.

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];

/** 1536 -> "1.50 KiB". */
export function bytes(count: number | undefined, digits = 2): string {
  if (count === undefined || !Number.isFinite(count)) return '–';
  let scaled = count;
  let unit = 0;
  while (Math.abs(scaled) >= 1024 && unit < UNITS.length - 1) {
    scaled /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(scaled) : scaled.toFixed(scaled >= 100 ? Math.min(digits, 1) : digits)} ${UNITS[unit]}`;
}

export function rate(bytesPerSecond: number | undefined): string {
  return bytesPerSecond === undefined ? '–' : `${bytes(bytesPerSecond, 1)}/s`;
}

/** 0.1234 -> "12.3 %". */
export function percent(fraction: number | undefined): string {
  if (fraction === undefined || !Number.isFinite(fraction)) return '–';
  return `${(fraction * 100).toFixed(1)} %`;
}

/** 93784 -> "1d 02:03:04". */
export function duration(seconds: number | undefined): string {
  if (!seconds || seconds < 0) return '–';
  const whole = Math.floor(seconds);
  const days = Math.floor(whole / 86_400);
  const parts = [Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60, whole % 60];
  const clock = parts.map((part) => String(part).padStart(2, '0')).join(':');
  return days > 0 ? `${days}d ${clock}` : clock;
}

const TIME = new Intl.DateTimeFormat(undefined, { month: 'short', day: '2-digit', hour: '2-digit', minute: '2-digit', second: '2-digit', hourCycle: 'h23' });

export function time(seconds: number | undefined): string {
  return seconds ? TIME.format(seconds * 1000) : '–';
}

export function fraction(used: number | undefined, total: number | undefined): number | undefined {
  return used === undefined || !total ? undefined : used / total;
}
